"""Model folders as transformers reads them: the right class for a task, the base for an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.errors import AdapterMismatchError, MergeError, ModelFolderError
from lowrank.expected import PREFIX
from lowrank.model_files import Stored, stored_tensors
from lowrank.quantised_files import AnyEntry, DequantisedEntry, packed_entries
from lowrank.task_types import TASK_HEADS

# task_type in the adapter's config → transformers' class for it, and the outputs to compare
TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", ("logits",)),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", ("logits",)),
    "SEQ_CLS": ("AutoModelForSequenceClassification", ("logits",)),
    "TOKEN_CLS": ("AutoModelForTokenClassification", ("logits",)),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", ("start_logits", "end_logits")),
    "FEATURE_EXTRACTION": ("AutoModel", ("last_hidden_state",)),
}
# what an architecture's name ends in → its task, for adapters that name none
ENDINGS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}

ROUNDING_KEY = (
    "lowrank.rounding"  # in a merged file's metadata: "inputs" where not every entry is the nearest
)
ONTO_KEY = "lowrank.onto"  # in a merged file's metadata, for an adapter trained on a quantised base: JSON, see merge


class NoSkeletonError(ModelFolderError):
    """transformers does not build the model from its configuration alone."""


class Loaded(NamedTuple):
    """A model and what transformers said while loading it."""

    model: nn.Module
    missing: list[str]  # tensors of the model that the folder does not have
    unexpected: list[str]  # tensors of the folder that the model does not have
    misshapen: list[str]  # tensors whose shapes in folder and config disagree (`any_shape` only)


def task_of(base: str | Path, task_type: Any, revision: str | None = None) -> str:
    """The key of TASKS for an adapter's `task_type`, or where it has none for the base's architecture."""
    if task_type is not None:
        return str(getattr(task_type, "value", task_type))
    architectures = load_config(base, revision).architectures or ["Model"]
    for ending, task in ENDINGS.items():
        if architectures[0].endswith(ending):
            return task
    raise ModelFolderError(
        f"The adapter's config names no task_type, and {base} is a {architectures[0]}, of which the "
        f'task cannot be told.\nSet "task_type" in adapter_config.json to one of: {", ".join(TASKS)}.'
    )


def base_of(config: Any, base: str | Path | None) -> str | Path:
    """`base`, or the one that the adapter's config names. Raises MergeError if there is none."""
    base = base or config.base_model_name_or_path
    if not base:
        raise MergeError(
            "The adapter's config names no base model (base_model_name_or_path is empty).\n"
            "Give the base's folder, or its name on the Hub."
        )
    return base


def load_config(folder: str | Path, revision: str | None = None) -> Any:
    """transformers' config of a folder or a name on the Hub. Raises ModelFolderError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), revision=revision)
    except (OSError, ValueError) as error:
        here = (
            "" if Path(folder).exists() else "there is no such folder here; as a name on the Hub: "
        )
        raise ModelFolderError(
            f"{folder} is not a model that transformers can read: {here}{error}"
        ) from error


def load_model(
    folder: str | Path,
    task: str,
    *,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    any_shape: bool = False,
    quantised: bool = False,
    **options: Any,
) -> Loaded:
    """The model in `folder` with transformers' class for `task`, in evaluation mode, on the CPU.

    dtype: "auto" keeps the stored one. any_shape: tensors that do not fit the config are reported
    instead of raised. quantised: whether the folder may be stored so; else it is refused. Tensors that
    the folder lacks (a head that the adapter brings) are initialised with seed 0. Raises ModelFolderError.
    """
    import transformers

    if task not in TASKS:
        raise ModelFolderError(
            f"No model class is known for task_type={task!r}. Known: {', '.join(TASKS)}."
        )
    by = quantised_by(load_config(folder, revision))
    if by is not None and not quantised:
        raise _quantised_error(folder, by)
    stored_tensors(folder, revision)  # files that are cut off or missing are told here, by name
    auto = getattr(transformers, TASKS[task][0])
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model, info = auto.from_pretrained(
                str(folder),
                dtype=dtype,
                revision=revision,
                output_loading_info=True,
                ignore_mismatched_sizes=any_shape,
                **options,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelFolderError(
                f"{folder} cannot be loaded with {TASKS[task][0]}: {error}"
            ) from error
    misshapen = sorted(str(key[0]) for key in info["mismatched_keys"])
    return Loaded(
        model.eval(), sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), misshapen
    )


def load_base(
    base: str | Path,
    task: str,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Loaded:
    """The base as the adapter was trained on it: as many labels and as large a vocabulary.

    tensors, metadata: the adapter's file, which names the labels. Its classifier decides `num_labels`, its embedding the vocabulary;
    head tensors that the base's folder does not have take the adapter's values. What bitsandbytes packed in the
    folder is loaded as the numbers that it stands for.
    """
    config = load_config(base, revision)
    options = trained_options(config, task, tensors, metadata)
    if quantised_by(config) == "bitsandbytes":
        loaded = _load_dequantised(base, task, tensors, dtype, revision)
    else:
        loaded = load_model(base, task, dtype=dtype, revision=revision, **options)
    _resize_vocabulary(loaded.model, tensors)
    state = loaded.model.state_dict()
    for name in list(loaded.missing):
        saved = tensors.get(PREFIX + name)
        if saved is not None and name in state and saved.shape == state[name].shape:
            state[name].copy_(saved)
            loaded.missing.remove(name)
    refuse_lacking(base, without_head(loaded.missing, "FEATURE_EXTRACTION"))
    return loaded


def refuse_lacking(folder: str | Path, names: list[str]) -> None:
    """Raises ModelFolderError if there are names of tensors that a folder should hold."""
    if names:
        what = "a tensor" if len(names) == 1 else f"{len(names)} tensors"
        raise ModelFolderError(
            f"{folder} lacks {what} of its model, which would be random: {', '.join(names[:5])}"
            + (", …" if len(names) > 5 else ".")
        )


def without_head(names: list[str], task: str, also: Sequence[str] = ()) -> list[str]:
    """`names` of tensors that a folder lacks, but for those that are trained: the task's head, and modules `also` named.

    A pooler is left out too where the task makes nothing of its outputs.
    """
    heads = {*TASK_HEADS.get(task, ()), *also, *(() if task == "SEQ_CLS" else ("pooler",))}
    return [name for name in names if heads.isdisjoint(name.split("."))]


def load_skeleton(
    base: str | Path,
    task: str,
    tensors: Mapping[str, Tensor],
    revision: str | None = None,
    dequantised: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """The model that `load_base` gives, on the meta device: names, shapes, modules, ties; no weights are read.

    dequantised: of a base that bitsandbytes packed, the model that it was before; else that is refused.
    """
    config = load_config(base, revision)
    by = quantised_by(config)
    if by is not None and not (dequantised and by == "bitsandbytes"):
        raise _quantised_error(base, by)
    if by is not None:
        del config.quantization_config
    for name, value in trained_options(config, task, tensors, metadata).items():
        setattr(config, name, value)
    model = _on_meta(config, task)
    _resize_vocabulary(model, tensors)
    return model


def quantised_by(config: Any) -> str | None:
    """The library that packed the weights of a folder, "bitsandbytes" or "gptq"; None for 16 or 32 bits."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    if (
        method is None
        and isinstance(found, dict)
        and (found.get("load_in_4bit") or found.get("load_in_8bit"))
    ):
        return "bitsandbytes"
    return str(getattr(method, "value", method))


def dequantised(stored: Stored, model: Any) -> dict[str, AnyEntry]:
    """The tensors of `stored`, with what bitsandbytes packed as the matrices that `model`, on the meta device, has there."""
    turned = {f"{p}.weight" for p, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    prefix = f"{model.base_model_prefix}."
    tensors = packed_entries(stored.tensors, model.config.dtype or torch.float16)
    for name, entry in tensors.items():
        if isinstance(entry, DequantisedEntry) and not turned.isdisjoint((name, prefix + name)):
            tensors[name] = dataclasses.replace(entry, shape=entry.shape[::-1], transposed=True)
    return tensors


def _load_dequantised(
    base: str | Path,
    task: str,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | str,
    revision: str | None,
) -> Loaded:
    skeleton = load_skeleton(base, task, {}, revision, dequantised=True)
    stored = stored_tensors(base, revision)
    if stored is None:
        raise ModelFolderError(
            f"{base} is stored quantised, and not as safetensors: it cannot be read."
        )
    config = skeleton.config
    for name, value in trained_options(config, task, tensors).items():
        setattr(config, name, value)
    held = dequantised(stored, skeleton)
    state = {
        name: entry.read().to(entry.torch_dtype if dtype == "auto" else dtype)
        if entry.floating
        else entry.read()
        for name, entry in held.items()
    }
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, info = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    return Loaded(model.eval(), sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), [])


def _quantised_error(folder: str | Path, by: str | None) -> ModelFolderError:
    what = {
        "bitsandbytes": "Name the folder in 16 bits instead.",
        "gptq": "Name the unquantised base, or merge in Python: load it through transformers, then "
        "PeftModel.from_pretrained(…).merge_and_unload().",
    }
    what["awq"] = what["gptq"]
    return ModelFolderError(
        f"{folder} is stored quantised ({by or 'by an unknown library'}), and its weights are not read out of such "
        f"files here.\n{what.get(by or '', what['bitsandbytes'])}"
    )


def _on_meta(config: Any, task: str) -> Any:
    import transformers
    from transformers.initialization import no_init_weights

    if task not in TASKS:
        raise ModelFolderError(
            f"No model class is known for task_type={task!r}. Known: {', '.join(TASKS)}."
        )
    try:
        with torch.device("meta"), quiet():
            with no_init_weights():  # half of the time, for numbers that nobody sees
                model = getattr(transformers, TASKS[task][0]).from_config(config)
            model.tie_weights()
            return model.eval()
    except ValueError as error:
        raise NoSkeletonError(
            f"transformers makes no {TASKS[task][0]} of its config: {error}"
        ) from error


def trained_options(
    config: Any,
    task: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What an adapter's file says of the base's configuration: its labels, or at least how many.

    Of a file that does not name them: `num_labels` when its classifier has another number than the base's config.
    """
    if task not in ("SEQ_CLS", "TOKEN_CLS"):
        return {}
    named = dict((metadata or {}).get("run", {}).get("model_options", {}))
    if named:
        if "id2label" in named:  # JSON has no keys but strings
            named["id2label"] = {int(i): label for i, label in named["id2label"].items()}
        return named
    model = _on_meta(config, task)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for key, saved in tensors.items():
        shape = shapes.get(key.removeprefix(PREFIX))
        if shape and shape != saved.shape and shape[0] == config.num_labels:
            return {"num_labels": saved.shape[0]}
    return {}


def _resize_vocabulary(model: Any, tensors: Mapping[str, Tensor]) -> None:
    embedding = model.get_input_embeddings()
    path = next((path for path, module in model.named_modules() if module is embedding), None)
    if not isinstance(embedding, nn.Embedding) or path is None:
        return
    names = (f"{path}.weight", f"{path}.base_layer.weight")
    saved = next((tensors[PREFIX + name] for name in names if PREFIX + name in tensors), None)
    if saved is None or saved.shape == embedding.weight.shape:
        return
    if saved.shape[1:] != embedding.weight.shape[1:]:
        raise AdapterMismatchError(
            f"The adapter's embedding is {tuple(saved.shape)}, the base's {tuple(embedding.weight.shape)}: "
            "this adapter was trained on another base."
        )
    with quiet():
        model.resize_token_embeddings(saved.shape[0], mean_resizing=False)


def embedding_names(model: Any) -> tuple[str, str] | None:
    """The state-dict names of the input and output embeddings' weights; None for a model without both."""
    try:
        modules = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    paths = {id(module): path for path, module in model.named_modules()}
    if any(
        getattr(module, "weight", None) is None or id(module) not in paths for module in modules
    ):
        return None
    first, second = (f"{paths[id(module)]}.weight" for module in modules)
    return first, second


def is_tied(model: Any) -> bool | None:
    """Whether the input and output embeddings are one tensor; None for a model without both."""
    names = embedding_names(model)
    if names is None:
        return None
    first, second = (model.get_parameter(name) for name in names)
    return first is second


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and load reports: what they tell is judged and told by us."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
