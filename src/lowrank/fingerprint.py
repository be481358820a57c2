"""A cheap fingerprint of a base model, so that an adapter is not put onto another base unnoticed.

For each adapted weight: its shape and 32 of its entries, rounded to bfloat16. The same base loaded as
float32, bfloat16 or float16 gives the same fingerprint up to a few last places. Of a quantised weight, the entries
are those that it stands for; with them go the quantisation and the largest magnitude of each entry's block. So the
base is recognised in another form: from the one value follows between which bounds the other has to be.
"""

import base64
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.bases.kinds import quantisation_of
from lowrank.errors import BaseMismatchError
from lowrank.kernels.quantisation import block_size_of, rounded
from lowrank.log import logger
from lowrank.quantisation import IN_BLOCKS, Quantisation
from lowrank.sharded import whole
from lowrank.wrappers import lora_chains, target_path

ENTRIES = 32
NO_FINGERPRINT = "%s carries no fingerprint of its base model, so the base could not be checked."
# formats and back ends that round each entry to the nearest, so that bounds for W follow from what it became
_TO_NEAREST = ({"nf4", "fp4", "int8"}, {"lowrank", "bitsandbytes"})
_COARSE = 1.5  # half of the widest step, in 2^(1−bits) of the block's largest magnitude, with room for other ways


class Sample(NamedTuple):
    """Of one weight what a fingerprint keeps."""

    shape: tuple[int, ...]  # (*expert, out, in)
    entries: Tensor  # (ENTRIES,), at `sample_places`
    scales: Tensor | None = (
        None  # (ENTRIES,), of a quantised weight the largest magnitude in each one's block
    )
    quantisation: Quantisation | None = None
    scale_error: float = 0.0  # how far a scale can be from the one that entries were divided by: not at all, or doubly quantised


def fingerprint(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """What identifies the base under the adapter: class, model type, and each adapted weight's sample.

    Empty if the weights are not there (meta device).
    """
    weights = {}
    config = getattr(model, "peft_config", {}).get(adapter_name)
    loftq = (
        getattr(config, "init_lora_weights", None) == "loftq"
    )  # it will quantise this base again
    for path, chain in lora_chains(model):
        for layer in reversed(chain):
            if adapter_name not in layer.r:
                continue
            W = layer.original_weight() if loftq else layer.unmerged_weight()
            if W.device.type == "meta":
                return {}
            quantisation = quantisation_of(layer.get_base_layer())
            weights[target_path(path, layer)] = _to_json(sample_of(W, quantisation))
    base = _base(model)
    return {
        "architecture": type(base).__name__,
        "model_type": getattr(getattr(base, "config", None), "model_type", None),
        "weights": weights,
    }


def check_base(
    model: nn.Module,
    adapter_name: str,
    saved: dict[str, Any] | None,
    keys: Collection[str],
    where: Any,
) -> None:
    """Raises BaseMismatchError if the base under the adapter is not the one whose fingerprint was `saved`.

    keys: of the adapter's file. A base weight that comes with the file (a resized embedding) is not
    compared. Without a fingerprint (the adapter was made by another library), the log gets one line.
    """
    if not saved:
        logger.warning(NO_FINGERPRINT, where)
        return
    suffix = ".base_layer.weight"
    brought = {_base_path(key.removesuffix(suffix)) for key in keys if key.endswith(suffix)}
    here = fingerprint(model, adapter_name)
    weights = here.get("weights", {}).items()
    here = {**here, "weights": {path: W for path, W in weights if path not in brought}}
    config = getattr(model, "peft_config", {}).get(adapter_name)
    named = getattr(config, "base_model_name_or_path", None)
    _raise_if_different(saved, here, where, f"this {type(_base(model)).__name__}", named)
    _warn_of_form(saved, here, where)


def check_samples(
    saved: dict[str, Any] | None,
    samples: Mapping[str, Sample],
    where: Any,
    base: Any,
    trained_on: str | None,
) -> None:
    """As `check_base`, from entries of the weights' files by path. Says nothing of the base in another form."""
    if not saved:
        logger.warning(NO_FINGERPRINT, where)
        return
    _raise_if_different(saved, {"weights": of_samples(samples)}, where, str(base), trained_on)


def of_samples(samples: Mapping[str, Sample]) -> dict[str, dict[str, Any]]:
    """The weights of a fingerprint."""
    return {path: _to_json(sample) for path, sample in samples.items()}


def quantisation_in(weight: Mapping[str, Any]) -> Quantisation | None:
    """How one weight of a fingerprint was quantised; None in 16 or 32 bits."""
    found = weight.get("quantisation")
    return Quantisation.from_json(found) if found else None


def _raise_if_different(
    saved: dict[str, Any], here: dict[str, Any], where: Any, what: str, trained_on: str | None
) -> None:
    name = trained_on or "its name was not saved"
    found = differences(saved, here)
    if found:
        rest = f"\n  … and {len(found) - 5} more" if len(found) > 5 else ""
        raise BaseMismatchError(
            f"{where} was trained on another base ({saved['architecture']}) than {what}:\n  "
            + "\n  ".join(found[:5])
            + rest
            + f"\nLoad the base that it was trained on ({name}), or have it here all the same with check_base=False (in Python)."
        )
    for then, now in _forms(saved, here):
        if then and now and then.rounding[:2] != now.rounding[:2]:
            raise BaseMismatchError(
                f"{where} was trained on this base ({name}) quantised to {then}; here it is quantised to {now}, "
                "which rounds each weight elsewhere.\nLoad the base as it was for training, or unquantised. "
                "check_base=False (in Python) has the adapter on this one all the same."
            )


def _forms(
    saved: Mapping[str, Any], here: Mapping[str, Any]
) -> list[tuple[Quantisation | None, Quantisation | None]]:
    """How the weights of both were quantised (then, now), where that gives other numbers; each pair once."""
    found = {}
    for path, now in here.get("weights", {}).items():
        if path in saved["weights"]:
            pair = quantisation_in(saved["weights"][path]), quantisation_in(now)
            if _rounding(pair[0]) != _rounding(pair[1]):
                found[pair] = pair
    return list(found)


def _rounding(quantisation: Quantisation | None) -> Any:
    return quantisation and quantisation.rounding


def _warn_of_form(saved: Mapping[str, Any], here: Mapping[str, Any], where: Any) -> None:
    for then, now in _forms(saved, here)[:1]:
        logger.warning(
            "%s was trained on this base %s, and is on it %s here: the same adapter, on weights that differ by the "
            "rounding. What that does to the outputs, lowrank merge measures (and verify, once merged).",
            where,
            f"quantised to {then}" if then else "unquantised",
            f"quantised to {now}" if now else "unquantised",
        )


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Why `current` is not the base that `saved` describes, a line for each weight; empty if it is.

    Entries within one unit in bfloat16's last place count as the same weight in another dtype, as long as
    most are exactly equal. Where one of the two is quantised, or both otherwise, each pair of entries has to be what
    roundings make of one weight.
    """
    found = []
    equal = total = 0
    for path, now in current.get("weights", {}).items():
        then = saved["weights"].get(path)
        if then is None:
            continue
        if then["shape"] != now["shape"]:
            found.append(
                f"{path}: trained on (out, in) = {tuple(then['shape'])}, here {tuple(now['shape'])}"
            )
            continue
        first, second = _from_json(then), _from_json(now)
        a, b = first.entries, second.entries
        same = (a == b) | (a.isnan() & b.isnan())
        if _rounding(first.quantisation) == _rounding(second.quantisation):
            # one unit in bfloat16's last place; below 2⁻¹⁴ float16 has its own, 2⁻²⁴
            tolerance = 2.0**-7 * torch.maximum(a.abs(), b.abs()) + 2.0**-24
            off = ~same & ~((a - b).abs() <= tolerance)
            equal += int(same.sum())
            total += len(a)
            said = "sampled entries differ"
        else:
            off = ~same & ~_of_one_weight(first, second)
            said = "sampled entries are not the same weight rounded"
        if off.any():
            share = ((a - b).norm() / a.norm().clamp_min(1e-30)).item()
            found.append(
                f"{path}: {int(off.sum())} of {len(a)} {said} (by {share:.2g} of their size)"
            )
    if not found and total and equal < 0.8 * total:
        found.append(
            f"only {equal} of {total} sampled entries are the same: a slightly different set of weights"
        )
    return found


def _of_one_weight(first: Sample, second: Sample) -> Tensor:
    """By entry, whether the two can be one weight in two forms."""
    if first.quantisation is None:
        first, second = second, first
    if second.quantisation is None and _to_nearest(first.quantisation):
        return _rounds_to(second.entries, first)
    reach = sum(_reach(sample) for sample in (first, second))
    return (first.entries - second.entries).abs() <= reach


def _to_nearest(quantisation: Quantisation | None) -> bool:
    formats, backends = _TO_NEAREST
    return (
        quantisation is not None
        and quantisation.format in formats
        and quantisation.backend in backends
    )


def _rounds_to(W: Tensor, sample: Sample) -> Tensor:
    """By entry, whether W, known to bfloat16's precision, is rounded to what `sample` has.

    Rounding is monotonic: what is a little less than W must not become more, and the reverse.
    """
    quantisation, scales, q = sample.quantisation, sample.scales, sample.entries
    assert quantisation is not None
    assert scales is not None
    apart = sample.scale_error / (scales - sample.scale_error).clamp_min(1e-30)
    # W, and the scale, were each rounded to 16 bits, perhaps twice
    slack = (2.0**-7 + apart) * W.abs() + 2.0**-24
    bounds = torch.stack([W - slack, W + slack]).clamp(-scales, scales)
    blocks = torch.stack(
        [scales.expand_as(bounds), bounds], dim=-1
    )  # each with its scale: (2, ENTRIES, 2)
    pairs = Quantisation(quantisation.format, block_size=2)
    low, high = rounded(blocks.view(-1, 2), pairs)[:, 1].view(2, -1)
    unit = 2.0**-7 * q.abs() + 2.0**-24  # in bfloat16's last place
    return (low - unit <= q) & (q <= high + unit)


def _reach(sample: Sample) -> Tensor | float:
    """How far the weight that was rounded can be from what it became."""
    if sample.quantisation is None or sample.scales is None:
        return 2.0**-7 * sample.entries.abs()
    return _COARSE * 2.0 ** (1 - sample.quantisation.bits) * sample.scales + sample.scale_error


def sample_places(out: int, in_: int) -> tuple[Tensor, Tensor]:
    """The rows and columns of the ENTRIES of W (out, in) that are kept, spread over both."""
    k = torch.arange(ENTRIES)
    return k * out // ENTRIES, (k * 7919 + 13) % in_


def sample_of(W: Tensor, quantisation: Quantisation | None = None) -> Sample:
    """What a fingerprint keeps of W (*expert, out, in); of a quantised weight, W is what it stands for."""
    W = whole(W)
    *rows, in_ = W.shape
    row, column = sample_places(math.prod(rows), in_)
    if quantisation is None:
        return Sample(tuple(W.shape), _at(W, row, column))
    blocked = quantisation.format in IN_BLOCKS
    size = block_size_of(quantisation) if blocked else quantisation.block_size or in_
    within = (row * in_ + column)[:, None] // size * size + torch.arange(size)  # (ENTRIES, size)
    within = within.clamp_max(W.numel() - 1)
    scales = _at(W, within // in_, within % in_).abs().amax(dim=1)
    error = _scale_error(W, size) if quantisation.double else 0.0
    return Sample(tuple(W.shape), _at(W, row, column), scales, quantisation, error)


def _scale_error(W: Tensor, size: int) -> float:
    """The most that quantising the scales to 8 bits moves one: of what they are off their mean, half a step.

    That code has 64 even steps between a tenth of its largest value and that value (Dettmers 2016, dynamic tree).
    """
    flat = W.detach().float().flatten()
    scales = nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size).abs().amax(dim=1)
    return 0.9 / 64 / 2 * (scales - scales.mean()).abs().max().item()


def _at(W: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Entries of W (*expert, out, in), its rows counted through; float32, on the CPU."""
    rows = tuple(W.shape[:-1])
    places = (*torch.unravel_index(row.to(W.device), rows), column.to(W.device))
    return W.detach()[places].float().cpu()


def _to_json(sample: Sample) -> dict[str, Any]:
    found: dict[str, Any] = {
        "shape": list(sample.shape),
        "sample": _encode(sample.entries.to(torch.bfloat16)),
    }
    if sample.quantisation is not None and sample.scales is not None:
        found["scales"] = _encode(sample.scales.float())
        found["quantisation"] = sample.quantisation.to_json()
        if sample.scale_error:
            found["scale_error"] = sample.scale_error
    return found


def _from_json(weight: Mapping[str, Any]) -> Sample:
    scales = _decode(weight["scales"], torch.float32) if "scales" in weight else None
    entries = _decode(weight["sample"], torch.bfloat16)
    shape, error = tuple(weight["shape"]), weight.get("scale_error", 0.0)
    return Sample(shape, entries, scales, quantisation_in(weight), error)


def _encode(numbers: Tensor) -> str:
    return base64.b64encode(numbers.view(torch.uint8).numpy().tobytes()).decode()


def _decode(text: str, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype).float()


def _base(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _base_path(path: str) -> str:
    """The path in the base model itself, without the wrappers' prefixes."""
    return path.removeprefix("base_model.model.").replace(".base_layer.", ".")
