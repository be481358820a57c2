"""PEFT's public names on lowrank's objects: `get_peft_model`, `PeftModel` and what goes with them."""

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank import functional
from lowrank.adapter_file import write_adapter
from lowrank.adding import add_to_model
from lowrank.alora import activated
from lowrank.bases.kinds import count_parameters
from lowrank.card import write_card
from lowrank.compat import ensure_recognised
from lowrank.config import LoraConfig
from lowrank.errors import (
    AdapterNameError,
    ConfigError,
    NotTrainableError,
    RowsError,
)
from lowrank.init import Init
from lowrank.inject import eject
from lowrank.loading import adapter_to_load, check_same_meaning, fill, take_start
from lowrank.lora_model import (
    LoraModel,
    rows,
)
from lowrank.preparing import checkpoints_activations, let_gradients_in
from lowrank.push import push_folder
from lowrank.quantised_base import in_words, quantised_layers
from lowrank.routing import Routing
from lowrank.saving import adapter_of, converted, warn_of_other_readers
from lowrank.start_factors import inits_from
from lowrank.state import LoadResult, vocab_size
from lowrank.task_types import TaskType
from lowrank.unload import unload
from lowrank.wrappers import adapter_names, merged_parameters, wrappers


class PeftModel(nn.Module):
    """A base model with adapters, with PEFT's methods. Made by `get_peft_model` or `from_pretrained`.

    `base_model` is the LoraModel, `base_model.model` the model itself. Everything that is not named here
    (`generate`, `config`, `save_…`) is the base model's.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        inits: Mapping[str, Init] | None = None,
    ):
        super().__init__()
        if isinstance(model, PeftModel) or adapter_names(model):
            raise AdapterNameError(
                f"This model already carries adapters ({', '.join(adapter_names(model))}): add_adapter and load_adapter "
                "add one more, unload() takes them out."
            )
        self.base_model = LoraModel(model)
        self.run_settings: dict[str, Any] = {}
        self.initial_vocab_size = vocab_size(model)
        self._check_trainable = False
        config = add_to_model(
            model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, inits
        )
        self.base_model.peft_config[adapter_name] = config
        self.base_model.set_adapter(adapter_name, inference_mode=config.inference_mode)
        self._routing = next((module.routing for _, module in wrappers(model)), Routing())
        if checkpoints_activations(model):
            let_gradients_in(model)
        ensure_recognised(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_model, name)

    # --- running ----------------------------------------------------------------------------------

    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward. adapter_names: for each row of the batch, the adapter it goes through.

        alora_offsets: for each row, how far from its end an activated LoRA starts; None: it is looked for.
        """
        if self._check_trainable and self.training and torch.is_grad_enabled():
            self._refuse_idle_training()
            # a flag that changes would compile everything a second time
            self._check_trainable = torch.compiler.is_compiling()
        if adapter_names is None and alora_offsets is None and not self._routing.invocations:
            return self.base_model(*args, **kwargs)
        with (
            self._rows(adapter_names, args, kwargs),
            self._activated(adapter_names, alora_offsets, args, kwargs) as finished,
        ):
            return finished(self.base_model(*args, **kwargs))

    def _refuse_idle_training(self) -> None:
        """With activation checkpointing a backward pass runs even if it reaches no parameter."""
        trainable = {id(p) for p in self.parameters() if p.requires_grad}
        if not trainable:
            raise NotTrainableError(
                f"Nothing in this model can be trained: adapter {self.active_adapter!r} was loaded for inference. "
                "Load it with is_trainable=True, or set_adapter() it; for dropout at inference, use torch.no_grad()."
            )
        if trainable <= merged_parameters(self):
            raise NotTrainableError(
                "All that can be trained is merged into the base, where no gradient reaches it: unmerge_adapter() first."
            )

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's `generate`, with the active adapters, or for each row with its own."""
        base: Any = self.get_base_model()
        with (
            self._rows(adapter_names, args, kwargs),
            self._activated(adapter_names, alora_offsets, args, kwargs, generating=True),
        ):
            return base.generate(*args, **kwargs)

    def _activated(
        self,
        names: Sequence[str] | None,
        offsets: Sequence[int | None] | None,
        args: tuple,
        kwargs: dict[str, Any],
        generating: bool = False,
    ) -> Any:
        running = self.active_adapters if names is None else names
        if any(module.disable_adapters for _, module in wrappers(self)):
            running, offsets = [], None
        base, routing = self.get_base_model(), self._routing
        return activated(base, routing, args, kwargs, running, offsets, generating=generating)

    @contextmanager
    def _rows(
        self, names: Sequence[str] | None, args: tuple, kwargs: dict[str, Any]
    ) -> Iterator[None]:
        if names is None:
            yield
            return
        tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
        if tensors and tensors[0].shape[0] != len(names):
            raise RowsError(
                f"adapter_names has {len(names)} names for a batch of {tensors[0].shape[0]} rows."
            )
        with rows(self, names):
            yield

    def train(self, mode: bool = True) -> "PeftModel":
        super().train(mode)
        self._check_trainable = mode
        return self

    def get_base_model(self) -> nn.Module:
        """The base model; the adapters are still in it."""
        return self.base_model.model

    # --- adapters ---------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Each adapter's configuration, by name."""
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> str | list[str]:
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> LoraConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> str | None:
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of the modules that some adapter saves whole."""
        names = {
            name for config in self.peft_config.values() for name in config.modules_to_save or []
        }
        return names or None

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        inits: Mapping[str, Init] | None = None,
    ) -> None:
        """One more adapter, new and not active. inits: initialisations by path, in place of the configuration's.

        Raises AdapterNameError if the name is taken.
        """
        self.base_model.add_adapter(
            adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage, inits
        )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters, and no others, act and (without `inference_mode`) trainable."""
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)
        self._check_trainable = self.training

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter for good."""
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is its base; afterwards everything is as before, merges included."""
        disabled_before = any(module.disable_adapters for _, module in wrappers(self))
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if not disabled_before:
                self.base_model.enable_adapter_layers()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Makes the parameters of these adapters trainable, or frozen."""
        functional.set_requires_grad(self, adapter_names, requires_grad)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, adapters counted in both; of a quantised weight all that it stands for."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints one line: trainable parameters, all parameters, and the share in per cent."""
        trainable, everything = self.get_nb_trainable_parameters()
        share = 100 * trainable / everything
        print(
            f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}"
        )

    # --- saving and loading -----------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        as_plain_lora: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes each adapter as PEFT does: "default" into the folder itself, others into one of their name.

        The files are read back and compared before they replace older ones. Beside PEFT's fields the
        header of the safetensors file holds the base's fingerprint, versions and `self.run_settings`.

        as_plain_lora: an adapter whose initialisation took its start out of the base's weights (PiSSA, OLoRA, …)
        is written as an ordinary LoRA of rank 2r for the untouched base. PEFT's way to ask for it,
        path_initial_model_for_weight_conversion, names the adapter saved before training; it is compared with
        the start, which is known here. Without either the start is written beside the adapter.
        """
        if not safe_serialization:
            raise ConfigError(
                "safe_serialization=False would write a pickle; only safetensors are written."
            )
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self.base_model.check_known(names)
        for name in names:
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            adapter = adapter_of(self, name, state_dict, save_embedding_layers)
            if is_main_process:
                written = converted(
                    adapter, name, as_plain_lora, path_initial_model_for_weight_conversion
                )
                write_adapter(folder, written)
                if written is adapter:
                    warn_of_other_readers(self, name, adapter.config)
        if is_main_process:
            self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Writes a README.md for the hub, unless there is one."""
        quantised = quantised_layers(self)
        words = in_words(quantised) if quantised else ""
        write_card(Path(output_dir), next(iter(self.peft_config.values())), words)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload LoRA adapter",
        revision: str | None = None,
        create_pr: bool = False,
        **save_arguments: Any,
    ) -> Any:
        """Saves the adapters into a temporary folder and uploads it. Returns huggingface_hub's CommitInfo.

        private: of a new repository; None: as its owner's settings say. What fails in a way that may pass is
        tried again. Raises HubError.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_arguments)
            return push_folder(
                Path(folder),
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        strict: bool = True,
        check_base: bool = True,
        ignore_unknown: bool = False,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> "PeftModel":
        """`model` with the adapter in a folder or on the hub; for inference, unless `is_trainable`.

        strict=False: load what fits although tensors are missing or unexpected. check_base=False: load
        although the base's fingerprint differs. ignore_unknown: drop unknown keys of its configuration.
        kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.
        Raises AdapterFileError, ConfigError, TargetError, AdapterMismatchError or BaseMismatchError; the
        model is then as it was.
        """
        adapter = adapter_to_load(
            model_id, config, subfolder=subfolder, ignore_unknown=ignore_unknown, **kwargs
        )
        config = dataclasses.replace(adapter.config, inference_mode=not is_trainable)
        trainable = [parameter.requires_grad for parameter in model.parameters()]
        wrapped = _class_for(config)(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype,
            low_cpu_mem_usage=strict,
            inits=inits_from(adapter),
        )
        options = {"is_trainable": is_trainable, "strict": strict, "check_base": check_base}
        try:
            fill(wrapped, adapter_name, adapter, model_id, **options)
        except Exception:
            unload(model, merge=False)
            for parameter, requires_grad in zip(model.parameters(), trainable, strict=True):
                parameter.requires_grad_(requires_grad)
            raise
        return wrapped

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        *,
        strict: bool = True,
        check_base: bool = True,
        ignore_unknown: bool = False,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> LoadResult:
        """Loads an adapter beside those that are there; it is not active yet.

        An existing name's tensors are replaced, and can be trained if they could be before, or `is_trainable`.
        Options and errors as in `from_pretrained`; the scaling of an existing name must be the file's.
        """
        adapter = adapter_to_load(
            model_id, subfolder=subfolder, ignore_unknown=ignore_unknown, **kwargs
        )
        new = adapter_name not in self.peft_config
        known = {module for _, module in wrappers(self)}
        if new:
            config = dataclasses.replace(adapter.config, inference_mode=not is_trainable)
            inits = inits_from(adapter)
            self.add_adapter(adapter_name, config, strict, autocast_adapter_dtype, inits=inits)
        else:
            here = self.peft_config[adapter_name]
            check_same_meaning(adapter.config, here, adapter_name, model_id)
        options = {"is_trainable": is_trainable, "strict": strict, "check_base": check_base}
        try:
            result = fill(self, adapter_name, adapter, model_id, **options)
            if not new:
                take_start(self, adapter_name, adapter)
            return result
        except Exception:
            if new:
                self.delete_adapter(adapter_name)
                eject(self.get_base_model(), keep=known)
            raise


class PeftModelForCausalLM(PeftModel):
    """task_type CAUSAL_LM."""


class PeftModelForSeq2SeqLM(PeftModel):
    """task_type SEQ_2_SEQ_LM."""


class PeftModelForSequenceClassification(PeftModel):
    """task_type SEQ_CLS: the classifier head is trained and saved whole."""


class PeftModelForTokenClassification(PeftModel):
    """task_type TOKEN_CLS: the classifier head is trained and saved whole."""


class PeftModelForQuestionAnswering(PeftModel):
    """task_type QUESTION_ANS: the qa_outputs head is trained and saved whole."""


class PeftModelForFeatureExtraction(PeftModel):
    """task_type FEATURE_EXTRACTION."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """`model` with a new adapter, ready to train; the model is changed in place.

    autocast_adapter_dtype: the adapter is float32 also on a bfloat16 or float16 base; False keeps the
    base's dtype. low_cpu_mem_usage: the adapter's tensors stay on the meta device, to be loaded.
    Raises TargetError with everything in the configuration that does not fit the model.
    """
    if mixed:
        raise ConfigError("mixed=True mixes adapter methods; lowrank does LoRA only.")
    name = getattr(model, "name_or_path", None) or peft_config.base_model_name_or_path
    config = dataclasses.replace(
        peft_config, base_model_name_or_path=name, revision=revision or peft_config.revision
    )
    return _class_for(config)(
        model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage
    )


def _class_for(config: LoraConfig) -> type[PeftModel]:
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)
