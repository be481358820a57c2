"""A cheap fingerprint of a base model, so that an adapter is not put onto another base unnoticed.

For each adapted weight: its shape and 32 of its entries, rounded to bfloat16. The same base loaded as
float32, bfloat16 or float16 gives the same fingerprint up to a few last places.
"""

import base64
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import BaseMismatchError
from lowrank.log import logger
from lowrank.wrappers import lora_chains, target_path

ENTRIES = 32
NO_FINGERPRINT = "%s carries no fingerprint of its base model, so the base could not be checked."


def fingerprint(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """What identifies the base under the adapter: class, model type, and each adapted weight's sample.

    Empty if the weights are not there (meta device).
    """
    weights = {}
    for path, chain in lora_chains(model):
        for layer in reversed(chain):
            if adapter_name not in layer.r:
                continue
            W = layer.unmerged_weight()
            if W.device.type == "meta":
                return {}
            weights[target_path(path, layer)] = {
                "shape": list(W.shape),
                "sample": _encode(_sample(W)),
            }
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
    config = getattr(model, "peft_config", {}).get(adapter_name)
    _raise_if_different(
        saved,
        {**here, "weights": {path: W for path, W in weights if path not in brought}},
        where,
        f"this {type(_base(model)).__name__}",
        getattr(config, "base_model_name_or_path", None),
    )


def check_samples(
    saved: dict[str, Any] | None,
    samples: Mapping[str, tuple[tuple[int, ...], Tensor]],
    where: Any,
    base: Any,
    trained_on: str | None,
) -> None:
    """As `check_base`, from entries of the weights' files: by path (out, in) and what lies at `sample_places`."""
    if not saved:
        logger.warning(NO_FINGERPRINT, where)
        return
    _raise_if_different(saved, {"weights": of_samples(samples)}, where, str(base), trained_on)


def of_samples(samples: Mapping[str, tuple[tuple[int, ...], Tensor]]) -> dict[str, dict[str, Any]]:
    """The weights of a fingerprint, from (*expert, out, in) and what lies at `sample_places` of each."""
    return {
        path: {"shape": list(shape), "sample": _encode(sample.to(torch.bfloat16))}
        for path, (shape, sample) in samples.items()
    }


def _raise_if_different(
    saved: dict[str, Any], here: dict[str, Any], where: Any, what: str, trained_on: str | None
) -> None:
    found = differences(saved, here)
    if found:
        name = trained_on or "its name was not saved"
        rest = f"\n  … and {len(found) - 5} more" if len(found) > 5 else ""
        raise BaseMismatchError(
            f"{where} was trained on another base ({saved['architecture']}) than {what}:\n  "
            + "\n  ".join(found[:5])
            + rest
            + f"\nLoad the base that it was trained on ({name}), or have it here all the same with check_base=False (in Python)."
        )


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Why `current` is not the base that `saved` describes, a line for each weight; empty if it is.

    Entries within one unit in bfloat16's last place count as the same weight in another dtype, as long as
    most are exactly equal.
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
        a, b = _decode(then["sample"]), _decode(now["sample"])
        same = (a == b) | (a.isnan() & b.isnan())
        # one unit in bfloat16's last place; below 2⁻¹⁴ float16 has its own, 2⁻²⁴
        tolerance = 2.0**-7 * torch.maximum(a.abs(), b.abs()) + 2.0**-24
        off = ~same & ~((a - b).abs() <= tolerance)
        if off.any():
            share = ((a - b).norm() / a.norm().clamp_min(1e-30)).item()
            found.append(
                f"{path}: {int(off.sum())} of {len(a)} sampled entries differ (by {share:.2g} of their size)"
            )
        equal += int(same.sum())
        total += len(a)
    if not found and total and equal < 0.8 * total:
        found.append(
            f"only {equal} of {total} sampled entries are the same: a slightly different set of weights"
        )
    return found


def sample_places(out: int, in_: int) -> tuple[Tensor, Tensor]:
    """The rows and columns of the ENTRIES of W (out, in) that are kept, spread over both."""
    k = torch.arange(ENTRIES)
    return k * out // ENTRIES, (k * 7919 + 13) % in_


def _sample(W: Tensor) -> Tensor:
    """ENTRIES entries of W (*expert, out, in), spread over its rows and columns; bfloat16, on the CPU."""
    *rows, in_ = W.shape
    row, column = (places.to(W.device) for places in sample_places(math.prod(rows), in_))
    at = torch.unravel_index(row, tuple(rows))
    return W.detach()[(*at, column)].to(torch.float32).to(torch.bfloat16).cpu()


def _encode(sample: Tensor) -> str:
    return base64.b64encode(sample.view(torch.uint8).numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16).float()


def _base(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _base_path(path: str) -> str:
    """The path in the base model itself, without the wrappers' prefixes."""
    return path.removeprefix("base_model.model.").replace(".base_layer.", ".")
