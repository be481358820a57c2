"""A cheap fingerprint of a base model, so that an adapter is not put onto another base unnoticed.

For each adapted weight: its shape and 32 of its entries, rounded to bfloat16. The same base loaded as
float32, bfloat16 or float16 gives the same fingerprint up to a few last places.
"""

import base64
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.wrappers import lora_layers

ENTRIES = 32


def fingerprint(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """What identifies the base under the adapter: class, model type, and each adapted weight's sample.

    Empty if the weights are not there (meta device).
    """
    weights = {}
    for path, layer in lora_layers(model):
        if adapter_name in layer.r:
            W = layer.unmerged_weight()
            if W.device.type == "meta":
                return {}
            weights[_base_path(path)] = {"shape": list(W.shape), "sample": _encode(_sample(W))}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "architecture": type(base).__name__,
        "model_type": getattr(getattr(base, "config", None), "model_type", None),
        "weights": weights,
    }


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
        off = (a - b).abs() > 2.0**-7 * torch.maximum(a.abs(), b.abs())
        if off.any():
            share = ((a - b).norm() / a.norm().clamp_min(1e-30)).item()
            found.append(
                f"{path}: {int(off.sum())} of {len(a)} sampled entries differ (by {share:.2g} of their size)"
            )
        equal += int((a == b).sum())
        total += len(a)
    if not found and total and equal < 0.8 * total:
        found.append(
            f"only {equal} of {total} sampled entries are the same: a slightly different set of weights"
        )
    return found


def _sample(W: Tensor) -> Tensor:
    """ENTRIES entries of W (out, in), spread over its rows and columns; bfloat16, on the CPU."""
    out, in_ = W.shape
    k = torch.arange(ENTRIES, device=W.device)
    return (
        W.detach()[k * out // ENTRIES, (k * 7919 + 13) % in_]
        .to(torch.float32)
        .to(torch.bfloat16)
        .cpu()
    )


def _encode(sample: Tensor) -> str:
    return base64.b64encode(sample.view(torch.uint8).numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16).float()


def _base_path(path: str) -> str:
    """The path in the base model itself, without the wrappers' prefixes."""
    return path.removeprefix("base_model.model.").replace(".base_layer.", ".")
