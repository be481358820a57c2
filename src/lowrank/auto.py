"""`AutoPeftModelFor…`: an adapter together with the base model that its configuration names."""

import importlib
from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar

from lowrank.config import LoraConfig, PeftConfig
from lowrank.errors import AdapterFileError, ConfigError
from lowrank.hub import HUB_KEYWORDS, adapter_file
from lowrank.peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

# where an adapter's own auto_mapping may name a class: importing runs the code of what is imported
ALLOWED = ("transformers", "diffusers", "lerobot")


class AutoPeftModel:
    """`AutoPeftModel.from_pretrained(adapter)`: for an adapter without task_type, whose file names the class."""

    task_type: ClassVar[str | None] = None
    base_class: ClassVar[str | None] = None  # in transformers

    def __init__(self, *args: Any, **kwargs: Any):
        raise OSError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(…).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base model with the adapter on it. kwargs go to the base's `from_pretrained`, and those of the hub to both.

        Where a tokenizer lies beside the adapter and has more tokens than the base, the base's vocabulary is
        resized to it first. import_allowlist: packages, beside transformers and diffusers, from which the
        configuration may name the base's class.
        Raises ConfigError if the adapter is for another task or names no base.
        """
        hub = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
        where = {**hub, "revision": revision}
        saved = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **where)
        base_class = cls._base_class(saved, (*ALLOWED, *(import_allowlist or ())))
        if saved.base_model_name_or_path is None:
            raise ConfigError(
                f"{pretrained_model_name_or_path} does not name its base model: load that yourself, then PeftModel.from_pretrained(base, …)."
            )
        base = base_class.from_pretrained(
            saved.base_model_name_or_path, revision=saved.revision, **kwargs
        )
        _fit_vocabulary(base, pretrained_model_name_or_path, where, kwargs)
        return PeftModel.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            **where,
        )

    @classmethod
    def _base_class(cls, config: LoraConfig, allowed: Sequence[str]) -> Any:
        task = (
            None
            if config.task_type is None
            else str(getattr(config.task_type, "value", config.task_type))
        )
        if task is not None and task != cls.task_type:
            right = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__.replace("Peft", "AutoPeft")
            raise ConfigError(f"This adapter has task_type {task}: use {right}.")
        if cls.base_class is not None:
            return getattr(importlib.import_module("transformers"), cls.base_class)
        mapping = config.auto_mapping or {}
        library, name = mapping.get("parent_library"), mapping.get("base_model_class")
        if not (library and name):
            raise ConfigError(
                "The adapter's configuration has neither task_type nor auto_mapping, so it does not say what class "
                "its base is: use AutoPeftModelForCausalLM or the like."
            )
        if not any(library == entry or library.startswith(f"{entry}.") for entry in allowed):
            raise ConfigError(
                f"The adapter's auto_mapping names a class in {library!r}, and importing that would run its code. If "
                f"you trust it: import_allowlist=[{library!r}]."
            )
        return getattr(importlib.import_module(library), name)


def _fit_vocabulary(
    base: Any, adapter: str | PathLike, where: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    try:
        beside = adapter_file(adapter, "tokenizer_config.json", required=False, **where)
    except AdapterFileError:  # offline, and never downloaded
        beside = None
    if beside is None or not hasattr(base, "get_input_embeddings"):
        return
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(
        adapter, trust_remote_code=kwargs.get("trust_remote_code", False), **where
    )
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """task_type CAUSAL_LM."""

    task_type, base_class = "CAUSAL_LM", "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """task_type SEQ_2_SEQ_LM."""

    task_type, base_class = "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """task_type SEQ_CLS."""

    task_type, base_class = "SEQ_CLS", "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """task_type TOKEN_CLS."""

    task_type, base_class = "TOKEN_CLS", "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """task_type QUESTION_ANS."""

    task_type, base_class = "QUESTION_ANS", "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """task_type FEATURE_EXTRACTION."""

    task_type, base_class = "FEATURE_EXTRACTION", "AutoModel"
