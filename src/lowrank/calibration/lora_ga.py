"""LoRA-GA for a whole model: `preprocess_loraga`, under PEFT's name."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.calibration.files import read_file, write_file
from lowrank.calibration.observe import Place, planned, undisturbed
from lowrank.config import LoraConfig
from lowrank.errors import InitDataError

GRADIENT = "_peft_loraga_grad"  # PEFT's name, on the module and in its cache files


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], object],
    cache_file: str | Path | None = None,
) -> None:
    """Leaves on each targeted layer of `model` the gradient that `get_peft_model` starts LoRA-GA from.

    train_step: runs forward and backward on some batches of the training data, as often as it likes, without
    an optimiser; the gradients of all backward passes are averaged. cache_file: read in its place if it is
    there, else written.
    Memory: each layer's gradient is moved to the CPU as soon as it is complete, and added up there in float32
    (all targeted weights once over); the device holds one at a time, in its own dtype.
    Raises InitDataError if no gradient reached a layer. The model is in training mode meanwhile; modes,
    requires_grad and gradients are always as they were afterwards.
    """
    if lora_config.lora_ga_config is None:
        raise InitDataError(
            "preprocess_loraga needs a LoraConfig with init_lora_weights='lora_ga'."
        )
    places = planned(model, lora_config)
    gradients = None
    if cache_file is not None:
        shapes = {f"{path}.{GRADIENT}": tuple(_weight(p).shape) for path, p in places.items()}
        gradients = read_file(cache_file, shapes)
    if gradients is None:
        gradients = _averaged(model, places, train_step)
        if cache_file is not None:
            write_file(cache_file, gradients)
    for path, place in places.items():
        setattr(place.module, GRADIENT, gradients[f"{path}.{GRADIENT}"])


def _averaged(
    model: nn.Module, places: Mapping[str, Place], train_step: Callable[[], object]
) -> dict[str, Tensor]:
    weights = {_weight(place): path for path, place in places.items()}
    sums: dict[nn.Parameter, Tensor] = {}
    counts: dict[nn.Parameter, int] = dict.fromkeys(weights, 0)

    def take(weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        wide = torch.promote_types(weight.dtype, torch.float32)
        gradient = weight.grad.to("cpu", wide)
        sums[weight] = sums[weight].add_(gradient) if weight in sums else gradient.clone()
        counts[weight] += 1
        weight.grad = None

    with undisturbed(model, training=True), _only(model, weights), ExitStack() as hooks:
        for weight in weights:
            hooks.callback(weight.register_post_accumulate_grad_hook(take).remove)
        with torch.enable_grad():
            train_step()
    found = {}
    problems = []
    for path, place in places.items():
        weight = _weight(place)
        if not counts[weight]:
            problems.append(f"{path}: train_step passed no gradient back to it.")
        elif not torch.isfinite(sums[weight]).all() or not sums[weight].any():
            problems.append(f"{path}: its gradient is zero or not finite.")
        else:
            found[f"{path}.{GRADIENT}"] = sums[weight] / counts[weight]
    if problems:
        more = f"\n… and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InitDataError("\n".join(problems[:5]) + more)
    return found


@contextmanager
def _only(model: nn.Module, weights: Mapping[nn.Parameter, str]) -> Iterator[None]:
    """Within, only `weights` require a gradient, and have none so far."""
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in weights)
            parameter.grad = None
        yield
    finally:
        for parameter, (requires_grad, gradient) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _weight(place: Place) -> nn.Parameter:
    return place.module.get_parameter(place.kind.weight)
