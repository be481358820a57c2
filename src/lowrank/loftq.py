"""LoftQ for a base that is quantised already: what the quantisation took, read from the original's files."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.bases.kinds import quantisation_of
from lowrank.errors import BaseMismatchError, MergeError, ModelFolderError, TargetError, listed
from lowrank.init.weight import svd
from lowrank.layer import LoraLayer
from lowrank.lora import initial_magnitude
from lowrank.model_files import stored_tensors
from lowrank.tensor_files import Entry, entries
from lowrank.wrappers import lora_layers

_PREFIX = "base_model.model."


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> list[str]:
    """Gives the adapter, at each quantised layer, the best approximation of what W lost; returns those layers' paths.

    s·B·A is that of W − Q with rank r, W the original weight and Q the quantised one: one turn of LoftQ (Li et al. 2023,
    Algorithm 1). W is read layer by layer. A DoRA magnitude starts anew.
    model_path: of the original model, a folder, a safetensors file or an id on the Hub; None: the one that the model's
    configuration names. callback: called after each layer with the model and the layer's path; where it returns False
    the adapter has its former values back, and the path is left out.
    Raises TargetError if the adapter has no quantised layer, or has its start taken out of W; MergeError if it is
    merged; ModelFolderError for tensors that are not there; BaseMismatchError if the files hold another model.
    """
    layers = _layers(peft_model, adapter_name)
    originals = _originals(peft_model, model_path, layers)
    replaced = []
    for path, layer in layers.items():
        before = {k: p.detach().clone() for k, p in layer.adapter_parameters(adapter_name).items()}
        _replace(layer, adapter_name, path, originals[path].read())
        if callback is None or callback(peft_model, path):
            replaced.append(path)
            continue
        for key, parameter in layer.adapter_parameters(adapter_name).items():
            parameter.copy_(before[key])
    return replaced


def _layers(model: nn.Module, name: str) -> dict[str, LoraLayer]:
    found = {
        path.removeprefix(_PREFIX): layer
        for path, layer in lora_layers(model)
        if name in layer.r and quantisation_of(layer.get_base_layer()) is not None
    }
    if not found:
        raise TargetError(
            f"Adapter {name!r} is on no quantised layer. On a base in 16 bits LoftQ is init_lora_weights='loftq'."
        )
    merged = [path for path, layer in found.items() if layer.merged]
    if merged:
        raise MergeError(f"{merged[0]}: unmerge_adapter() before its weights are replaced.")
    started = [path for path, layer in found.items() if layer.start_factors(name)]
    if started:
        raise TargetError(
            f"{started[0]}: its start is taken out of W (PiSSA, OLoRA, CorDA), and would be no more. Make the adapter "
            "with init_lora_weights=True."
        )
    return found


def _originals(
    model: Any, model_path: str | os.PathLike | None, layers: Mapping[str, LoraLayer]
) -> dict[str, Entry]:
    """Where the original weight of each layer lies."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    where = model_path or getattr(getattr(base, "config", None), "_name_or_path", "")
    if not where:
        raise ModelFolderError(
            "The model does not say where it came from: model_path= names the folder of the original."
        )
    path = Path(where)
    if path.suffix == ".safetensors" and path.is_file():
        tensors = entries(path)[0]
    else:
        stored = stored_tensors(str(where))
        if stored is None:
            raise ModelFolderError(
                f"{where} has no safetensors files, from which single weights can be read."
            )
        tensors = stored.tensors
    prefix = getattr(base, "base_model_prefix", "")
    found: dict[str, Entry] = {}
    for layer_path in layers:
        name = f"{layer_path}.weight"
        for option in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if option in tensors and tensors[option].floating:
                found.setdefault(layer_path, tensors[option])
    problems = [
        f"{where} has no {path}.weight in 16 or 32 bits." for path in layers if path not in found
    ]
    problems += [
        f"{path}: the file has {entry.shape}, the layer is (out, in) = {_shape(layers[path])}."
        for path, entry in found.items()
        if sorted(entry.shape) != sorted(_shape(layers[path]))
    ]
    if problems:
        raise ModelFolderError(listed(problems))
    return found


def _shape(layer: LoraLayer) -> tuple[int, int]:
    return layer.kind.shape(layer.get_base_layer())


def _replace(layer: LoraLayer, name: str, path: str, stored: Tensor) -> None:
    Q = layer.unmerged_weight()
    lost = _lost(stored.to(Q.device, Q.dtype), Q, path)
    scaling = float(layer.scaling[name])
    if scaling <= 0:
        raise TargetError(
            f"{path}: with a scaling of {scaling:g} no adapter can make up for anything."
        )
    parameters = list(layer.adapter_parameters(name).items())
    (_, A), (_, B) = parameters[:2]
    found = svd(lost, layer.r[name])
    root = (found.S / scaling).sqrt()
    for parameter in (A, B):  # whose rank may be larger than W's, or padded
        parameter.zero_()
    A[: len(root)] = root[:, None] * found.Vh
    B[:, : len(root)] = found.U * root
    for key, parameter in parameters[2:]:
        if key.startswith("lora_magnitude"):
            parameter.copy_(initial_magnitude(Q, layer.lora(name)).view(parameter.shape))
        else:  # lora_bias
            parameter.zero_()


def _lost(W: Tensor, Q: Tensor, path: str) -> Tensor:
    """W − Q. GPT-2's weights lie in its files as (in, out), and a square one does not say so: Q is near W, not Wᵀ."""
    ways = [M - Q for M in (W, W.T) if M.shape == Q.shape]
    lost = min(ways, key=lambda M: M.norm().item())
    share = (lost.norm() / Q.norm().clamp_min(1e-30)).item()
    if not share < 0.8:
        raise BaseMismatchError(
            f"{path}: the weight in the files is {share:.0%} of its size off the quantised one, so it is another model's. "
            "model_path= names the folder of the model that was quantised."
        )
    return lost
