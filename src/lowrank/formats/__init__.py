"""Adapters in the formats of other programs: a table of readers and writers, with `Adapter` in the middle."""

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lowrank.adapter_file import WEIGHTS_NAME, Adapter
from lowrank.config import CONFIG_NAME, LoraConfig
from lowrank.errors import ConvertError, did_you_mean, listed
from lowrank.formats import diffusers, mlx, peft
from lowrank.formats.layers import KINDS, Options, check_holds, without
from lowrank.start_factors import as_plain_lora, start_problems


class Format(NamedTuple):
    """One row: a module with `read(path, options)`, `write(path, adapters, options)` and HOLDS, of KINDS."""

    module: str
    components: bool  # several adapters in one: a pipeline's unet, text_encoder, …
    any_config: bool  # carries PEFT's configuration as it is


FORMATS = {
    "peft": Format("lowrank.formats.peft", components=True, any_config=True),
    "diffusers": Format("lowrank.formats.diffusers", components=True, any_config=True),
    "kohya": Format("lowrank.formats.kohya", components=True, any_config=False),
    "mlx": Format("lowrank.formats.mlx", components=False, any_config=False),
    "gguf": Format("lowrank.formats.gguf", components=False, any_config=False),
}


class Converted(NamedTuple):
    """What a conversion did."""

    source: str  # the format read
    adapters: dict[str, Adapter]  # by component, as they were written; "" for an adapter by itself
    files: list[Path]
    dropped: dict[str, list[str]]  # by kind, the keys that were left out
    notes: list[str]  # which programs do not read all that the file says


def convert(
    source: str | PathLike,
    out: str | PathLike,
    to: str,
    *,
    source_format: str | None = None,
    component: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    drop: Iterable[str] | str = (),
    overwrite: bool = False,
) -> Converted:
    """Writes the adapter in `source` to `out` in another format, with the same ΔW at every layer.

    to, source_format: "peft", "diffusers", "kohya", "mlx" or "gguf"; the source's is recognised by its files.
    component: of a file with several (unet, text_encoder, …) the one to take; for an adapter by itself that
        goes into such a file, what it is for.
    base: the base model's folder or name on the Hub, which the configuration then names. Needed, if the adapter's
        own does not name it, for its config.json (GGUF; MLX with an embedding); kohya's names are then those of
        this pipeline's folder.
    dtype: "f32" (default) or "f16", for GGUF. The other formats keep the tensors' own.
    drop: kinds of tensors to leave out, that are refused otherwise: dora, lora_bias, embeddings, convolutions,
        saved, unknown.
    Scalings that a format has no place for are multiplied into B, in float32 where B's own dtype would round.
    Raises ConvertError, with all that is wrong, before anything is written.
    """
    kinds = frozenset([drop] if isinstance(drop, str) else drop)
    out, problems = Path(out), []
    for what, name, names in [("format", to, FORMATS), ("format", source_format, FORMATS)] + [
        ("kind of tensors to drop", kind, KINDS) for kind in sorted(kinds)
    ]:
        if name is not None and name not in names:
            problems.append(
                f"There is no {what} {name!r}.{did_you_mean(name, names)} There are: {', '.join(names)}."
            )
    if dtype is not None and (to != "gguf" or dtype not in ("f32", "f16")):
        problems.append(f"dtype={dtype!r}: only gguf has a choice, of f32 and f16.")
    if Path(source).exists() and Path(source).resolve() == out.resolve():
        problems.append(f"{out} is what is read: name another place.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())) and not overwrite:
        problems.append(
            f"{out} exists. Name another, or overwrite it (overwrite=True, --overwrite)."
        )
    if problems:
        raise ConvertError(listed(problems))

    options = Options(base, dtype, kinds)
    format = source_format or detect(source)
    adapters = _chosen(_module(format).read(Path(source), options), component, to, str(source))
    dropped: dict[str, list[str]] = {}
    for name, adapter in adapters.items():
        if base is not None:
            config = dataclasses.replace(adapter.config, base_model_name_or_path=base)
            adapter = adapter._replace(config=config)
        adapters[name], gone = without(adapter, kinds)
        for kind, keys in gone.items():
            dropped.setdefault(kind, []).extend(f"{name}.{key}".lstrip(".") for key in keys)
    _check(adapters, to)
    if to != "peft":  # only there does a start have its file (PiSSA, OLoRA, …)
        adapters = {name: as_plain_lora(adapter) for name, adapter in adapters.items()}
    files = _module(to).write(out, adapters, options)
    notes = _module(to).notes(adapters) if hasattr(_module(to), "notes") else []
    return Converted(format, adapters, files, dropped, notes)


def detect(path: str | PathLike) -> str:
    """The name of the format that a file or folder is of. Raises ConvertError if it is of none."""
    path = Path(path)
    if path.is_dir():
        if (path / mlx.WEIGHTS).exists():
            return "mlx"
        if (path / CONFIG_NAME).exists():
            values = LoraConfig.from_json_file(path / CONFIG_NAME)
            return "mlx" if "fine_tune_type" in values else "peft"
        if (path / WEIGHTS_NAME).exists() or peft.components(path):
            return "peft"
        if (path / diffusers.FILE).exists():
            return "diffusers"
        there = sorted(inner.name for inner in path.iterdir())
        raise ConvertError(
            f"{path} holds no adapter of a known format (peft, diffusers, mlx). It has: "
            f"{', '.join(there[:10]) or 'nothing'}. A single file is named itself."
        )
    if not path.exists():
        return "peft"  # a name on the Hub, or PEFT's reader says that there is nothing
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return "gguf"
    if path.suffix != ".safetensors":
        raise ConvertError(f"{path} is neither a safetensors file nor GGUF.")
    try:
        with safe_open(path, framework="pt") as opened:
            keys = list(opened.keys())
    except SafetensorError as error:
        raise ConvertError(f"{path} is not a whole safetensors file: {error}") from error
    if any(".lora_down." in key or key.endswith(".dora_scale") for key in keys):
        return "kohya"
    if path.name in (WEIGHTS_NAME, mlx.WEIGHTS):
        raise ConvertError(f"{path} is read with the configuration beside it: name {path.parent}.")
    if any("lora" in key for key in keys):
        return "diffusers"
    raise ConvertError(f"{path} holds no adapter of a known format: {', '.join(keys[:5])}.")


def _module(format: str) -> Any:
    return importlib.import_module(FORMATS[format].module)


def _chosen(
    found: dict[str, Adapter], component: str | None, to: str, source: str
) -> dict[str, Adapter]:
    """The adapters to write, by the names that the target has for them."""
    alone = list(found) == [""]
    row = FORMATS[to]
    if alone and to != "peft" and row.components:
        if component is None:
            raise ConvertError(
                f"A file of {to} says of each adapter which part of a pipeline it is for: component= "
                "(--component) unet, transformer, text_encoder or text_encoder_2."
            )
        return {component: found[""]}
    if alone and component is not None:
        raise ConvertError(f"{source} holds one adapter without components, and {to} needs none.")
    if component is not None:
        if component not in found:
            raise ConvertError(
                f"{source} has no component {component!r}.{did_you_mean(component, found)} It has: "
                f"{', '.join(found)}."
            )
        return {"" if to == "peft" or not row.components else component: found[component]}
    if not row.components and not alone:
        raise ConvertError(
            f"{to} holds one adapter, {source} has {', '.join(found)}: component= (--component) takes one."
        )
    return dict(found)


def _check(adapters: Mapping[str, Adapter], to: str) -> None:
    problems = []
    for name, adapter in adapters.items():
        start = start_problems(adapter, name or "The adapter")
        if start:
            problems += start if to != "peft" else []
            continue
        try:
            check_holds(adapter, to, _module(to).HOLDS, FORMATS[to].any_config)
        except ConvertError as error:
            problems.append(f"{name}: {error}" if name else str(error))
    if problems:
        raise ConvertError(listed(problems))
