"""`quantise_model`: the linear layers of a model in few bits, in place."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lowrank.architectures import BYPASSED, WEIGHT_TAKEN
from lowrank.bases import ops
from lowrank.bases.kinds import is_quantised, kind_of
from lowrank.bases.quantised_linear import QuantisedLinear
from lowrank.errors import QuantisationError, TargetError, did_you_mean
from lowrank.matching import listed_under
from lowrank.quantisation import Quantisation


def quantise_model(
    model: nn.Module,
    quantisation: Quantisation,
    skip: Sequence[str] | None = None,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Puts a QuantisedLinear in the place of each linear layer, and returns their paths.

    Which ones: `quantisable`. compute_dtype: of their products; None: the input's. One layer at a time is held
    twice. A folder that `from_pretrained` reads is written by `lowrank quantize`, or from a model that was loaded with
    a `QuantizationConfig`: this model's own config does not say that it is quantised.
    Raises QuantisationError for a weight that cannot be rounded; the layers before it are quantised then.
    """
    paths = quantisable(model, skip)
    for path in paths:
        owner, _, name = path.rpartition(".")
        parent = model.get_submodule(owner)
        setattr(parent, name, quantised(parent.get_submodule(name), quantisation, compute_dtype))
    return paths


def quantised(
    layer: nn.Module, quantisation: Quantisation, compute_dtype: torch.dtype | None = None
) -> QuantisedLinear:
    """What stands in the place of a linear layer of any kind, GPT-2's transposed ones included."""
    kind = kind_of(layer)
    if kind is None or kind.op is not ops.LINEAR:
        raise QuantisationError(f"A {type(layer).__name__} is no linear layer.")
    bias: Any = getattr(layer, "bias", None)
    W = kind.store(layer).read().detach()
    new = QuantisedLinear.from_weight(W, bias, quantisation, compute_dtype)
    return new.train(layer.training)


def quantisable(model: nn.Module, skip: Sequence[str] | None = None) -> list[str]:
    """The paths of the layers that `quantise_model` quantises, in the model's order.

    All linear layers that are called, but for those which `skip` names, by a path or the end of one (None: the
    output embeddings, as transformers does), those whose weight another module shares, those that the
    architecture keeps in float32, and those that are quantised. Also on the meta device. Raises TargetError
    if a name in `skip` is in no path.
    """
    modules = dict(model.named_modules())
    names = list(_kept(model, modules) if skip is None else skip)
    for name in skip or ():
        if not any(_named(path, name) for path in modules):
            ends = {path.rpartition(".")[2] for path in modules}
            raise TargetError(
                f"skip names {name!r}, and no module is called so.{did_you_mean(name, ends)}"
            )
    names += getattr(model, "_keep_in_fp32_modules", None) or ()
    names += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    shared = _shared(modules.values())
    found = []
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0]) if path else None
        kind = kind_of(module, parent=parent)
        weight = getattr(module, "weight", None)
        if (
            path
            and kind is not None
            and kind.op is ops.LINEAR
            and not kind.weight_taken
            and not is_quantised(module)
            and id(weight) not in shared
            and not any(_named(path, name) for name in names)
            and not listed_under(WEIGHT_TAKEN, model, modules, path)
            and not listed_under(BYPASSED, model, modules, path)
        ):
            found.append(path)
    return found


def _kept(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[str]:
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    yield from (path for path, module in modules.items() if module is head and path)


def _named(path: str, name: str) -> bool:
    """Whether the module is inside what `name` names."""
    return f".{path}.".find(f".{name}.") >= 0


def _shared(modules: Any) -> set[int]:
    """The ids of the parameters that several modules have."""
    owners: dict[int, int] = {}
    for module in modules:
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {parameter for parameter, count in owners.items() if count > 1}
