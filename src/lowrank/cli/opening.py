"""From the words of a command line to models, tokenizers and rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lowrank.errors import LowrankError
from lowrank.quantisation import Quantisation
from lowrank.task_types import TASK_HEADS
from lowrank.train.data.rows import DataError, ReadData, Row, read_data, supervised
from lowrank.train.tasks.table import TASKS, Task

EMBEDDED = "embedded"
DEFAULT_LENGTH = 2048


class OpeningError(LowrankError, ValueError):
    """What a command was given is not a model, an adapter or data."""


class Opened(NamedTuple):
    model: Any
    tokenizer: Any
    path: str  # of the base
    adapter: str | None
    quantisation: Quantisation | None  # in which the base was loaded


def model_path(name: str) -> str:
    """A folder or a name on the Hub; `embedded` is the model in this package."""
    if name != EMBEDDED:
        looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
        if looks_local and not Path(name).is_dir():
            raise OpeningError(f"there is no model folder {name}")
        return name
    from lowrank.embedded import model_path

    return str(model_path())


def data_paths(names: list[str] | str, split: str) -> list[str]:
    """`names`, where `embedded:NAME` is a data set in this package, its `split` part."""
    return [_data_path(name, split) for name in ([names] if isinstance(names, str) else names)]


def _data_path(name: str, split: str) -> str:
    from lowrank import embedded

    if name == EMBEDDED:
        return str(embedded.BASE_SKILL)
    if not name.startswith(f"{EMBEDDED}:"):
        return name
    return str(embedded.dataset_path(name.partition(":")[2], split))


def adapter_base(folder: str) -> str | None:
    """The base that the adapter in `folder` names; None if the folder holds no adapter."""
    from lowrank.config import CONFIG_NAME, LoraConfig

    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return None
    return LoraConfig.from_json_file(path).get("base_model_name_or_path") or ""


def base_and_adapter(name: str, adapter: str | None) -> tuple[str, str | None]:
    """What is the base and what the adapter: `name` may be the adapter's folder itself."""
    base = adapter_base(name) if name != EMBEDDED else None
    if base is not None and adapter is None:
        if not base:
            raise OpeningError(
                f"{name} is an adapter that does not name its base. Use: BASE --adapter {name}"
            )
        name, adapter = base, name
    if adapter is not None and adapter_base(adapter) is None and Path(adapter).exists():
        raise OpeningError(f"{adapter} holds no adapter: there is no adapter_config.json in it")
    return name, adapter


def open_model(
    name: str,
    adapter: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    quantisation: Quantisation | Literal["as named"] | None = "as named",
    task_type: str = "CAUSAL_LM",
) -> Opened:
    """A base, alone or with an adapter, for evaluation. `name` may be the adapter's folder itself.

    quantisation: how the base is rounded while it is loaded; "as named": as the adapter's file says.
    """
    name, adapter = base_and_adapter(name, adapter)
    path = model_path(name)
    tokenizer = open_tokenizer(path, revision)
    if quantisation == "as named":
        quantisation = None if adapter is None else named_quantisation(adapter, path)
    options: dict[str, Any] = {}
    if adapter is not None and task_type in TASK_HEADS:
        from lowrank.adapter_file import read_adapter
        from lowrank.model_folder import load_config, trained_options

        config, file = load_config(path, revision), read_adapter(adapter)
        options = trained_options(config, task_type, file.tensors, file.metadata)
        options["saved"] = file.config.modules_to_save or ()
    model = open_base(
        path,
        dtype=dtype,
        device=device,
        revision=revision,
        quantisation=quantisation,
        task_type=task_type,
        **options,
    )
    if adapter is not None:
        from lowrank import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    return Opened(model, tokenizer, path, adapter, quantisation)


def task_for(name: str, adapter: str | None = None) -> Task:
    """The task that an adapter was trained for; of others the first with its task_type, or the architecture's."""
    from lowrank.adapter_file import read_adapter
    from lowrank.model_folder import task_of

    name, adapter = base_and_adapter(name, adapter)
    task_type = None
    if adapter is not None:
        saved = read_adapter(adapter)
        task = saved.metadata.get("run", {}).get("train.task")
        if task in TASKS:
            return TASKS[task]
        task_type = saved.config.task_type
    wanted = task_of(model_path(name), task_type)
    for task in TASKS.values():
        if task.task_type == wanted:
            return task
    raise OpeningError(
        f"{adapter or name} is for {wanted}, of which no task is known: name one with --task"
    )


def open_base(
    path: str,
    *,
    dtype: str,
    device: str,
    revision: str | None = None,
    quantisation: Quantisation | None = None,
    task_type: str = "CAUSAL_LM",
    saved: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """A model of the task's class with all its weights, on its device; rounded tensor by tensor if so told.

    options: of its configuration (num_labels, …). A task's head that the folder lacks is new, as are modules named in
    `saved`, which an adapter holds.
    """
    from lowrank.model_folder import (
        load_config,
        load_model,
        quantised_by,
        refuse_lacking,
        without_head,
    )

    where = pick_device(device)
    if quantisation is None and quantised_by(load_config(path, revision)) is None:
        held = pick_dtype(dtype, where)
        loaded = load_model(path, task_type, dtype=held, revision=revision, **options)
        refuse_lacking(path, without_head(loaded.missing, task_type, saved))
        return loaded.model.to(where)
    from lowrank.quantised_loading import load_quantised

    concrete = loaded_dtype(path, dtype, device, revision)
    return load_quantised(path, task_type, quantisation, concrete, where, revision, **options)


def named_quantisation(adapter: str, base: str) -> Quantisation | None:
    """How the base was quantised that the adapter was trained on, if it was, and `base` is not stored so."""
    from lowrank.adapter_file import read_tensors
    from lowrank.model_folder import load_config, quantised_by
    from lowrank.quantised_base import METADATA_KEY, from_json, in_words
    from lowrank.quantised_loading import held_here

    layers = from_json(read_tensors(adapter)[1].get(METADATA_KEY))
    if not layers or quantised_by(load_config(base)) is not None:
        return None
    named = set(layers.values())
    if len(named) > 1:
        raise OpeningError(
            f"{adapter} was trained on a base whose layers are quantised in several ways: {in_words(layers)}.\n"
            "Say which one to load it in: --quantize none, nf4, fp4 or int8."
        )
    return held_here(named.pop())


def empty_model(path: str, revision: str | None = None, task_type: str = "CAUSAL_LM") -> Any:
    """A model of the task's class, of `path`'s config, on the meta device: shapes and no weights."""
    import transformers

    from lowrank.model_folder import TASKS as CLASSES
    from lowrank.model_folder import load_config, quiet

    config, auto = load_config(path, revision), CLASSES[task_type][0]
    with torch.device("meta"), quiet():
        try:
            return getattr(transformers, auto).from_config(config)
        except ValueError:
            raise OpeningError(
                f"{path} is a {type(config).__name__.removesuffix('Config')}, and transformers has "
                f"no {auto} of that architecture"
            ) from None


def open_tokenizer(path: str, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision)
    except Exception as error:  # tokenizers raises just this
        reason = str(error).split("\n", 1)[0]
        raise OpeningError(
            f"{path} has no tokenizer that transformers can read: {reason}"
        ) from None


def pick_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise OpeningError(
            "model.device is cuda, and torch sees no CUDA device here. Use cpu or auto."
        )
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if device == "auto" else device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """auto: float32 on a CPU, where it is the fast one and rounds least; elsewhere as stored."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, dtype)


def loaded_dtype(path: str, dtype: str, device: str, revision: str | None = None) -> torch.dtype:
    """The dtype in which `open_base` holds what is not quantised."""
    from lowrank.model_folder import load_config

    picked = pick_dtype(dtype, pick_device(device))
    if isinstance(picked, torch.dtype):
        return picked
    return getattr(load_config(path, revision), "dtype", None) or torch.float32


def context_length(model_config: Any, wanted: int | None) -> int:
    """Tokens a row may have: as wanted, if the model can; else 2048 or what the model can."""
    limit = getattr(model_config, "max_position_embeddings", None) or DEFAULT_LENGTH
    if wanted is None:
        return min(limit, DEFAULT_LENGTH)
    if wanted > limit:
        raise OpeningError(
            f"data.max_length is {wanted}, and the model was made for {limit} tokens at most"
        )
    return wanted


def open_rows(names: list[str] | str, split: str, **reading: Any) -> list[Row]:
    return supervised(open_read(names, split, **reading))


def open_read(names: list[str] | str, split: str, **reading: Any) -> ReadData:
    """The rows behind `names`, with what was found out about them."""
    return read_data(data_paths(names, split), split=split, **reading)


def held_out(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, evaluation rows): `share` of them below 1, else that many, drawn by `seed`."""
    count = round(len(rows) * share) if share < 1 else int(share)
    if not 0 < count < len(rows):
        raise DataError(
            f"data.eval_split={share:g} of {len(rows)} rows leaves {len(rows) - count} to train on and {count} to evaluate on"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:count])
    return (
        [row for i, row in enumerate(rows) if i not in chosen],
        [row for i, row in enumerate(rows) if i in chosen],
    )
