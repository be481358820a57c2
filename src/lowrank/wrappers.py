"""Finding what lowrank has put into a model: its layers, adapters and their parameters."""

from collections.abc import Iterator

from torch import nn

from lowrank.bases.kinds import is_bare
from lowrank.layer import LoraLayer
from lowrank.saved_module import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from lowrank.trainable_tokens import TrainableTokensWrapper

Wrapper = LoraLayer | ModulesToSaveWrapper | TrainableTokensWrapper


def wrappers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Every one of them with its path in the model as it is now."""
    for path, module in model.named_modules():
        if isinstance(module, Wrapper):
            yield path, module


def inner(module: nn.Module) -> nn.Module:
    """The base's own module in a wrapper; any other as it is."""
    if isinstance(module, LoraLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every LoraLayer with its path in the model as it is now."""
    return ((path, module) for path, module in wrappers(model) if isinstance(module, LoraLayer))


def lora_chains(model: nn.Module) -> Iterator[tuple[str, list[LoraLayer]]]:
    """For every adapted module its path and its LoraLayers, outermost first: several for several parameters."""
    inner: set[int] = set()
    for path, layer in lora_layers(model):
        if id(layer) not in inner:
            chain = layer.chain()
            inner.update(map(id, chain))
            yield path, chain


def target_path(path: str, layer: LoraLayer) -> str:
    """The path that a pattern of the configuration is matched against, of the layer at `path` in the model."""
    path = path.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if not is_bare(layer.kind):
        return path
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return f"{path}.{layer.kind.weight}"


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters in `model`, in the order in which they came."""
    return list(dict.fromkeys(name for _, module in wrappers(model) for name in module.adapters))


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that belongs to an adapter, by its name in the model as it is now."""
    for path, module in wrappers(model):
        for name in module.adapters:
            for key, parameter in module.adapter_parameters(name).items():
                yield f"{path}.{key}" if path else key, parameter


def mergeable(model: nn.Module) -> Iterator[tuple[str, LoraLayer | TrainableTokensWrapper]]:
    """What a merge changes the weight of, with its path in the model as it is now."""
    for path, module in wrappers(model):
        if not isinstance(module, ModulesToSaveWrapper):
            yield path, module


def merged_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters of adapters that are merged at present."""
    return {
        id(parameter)
        for _, layer in mergeable(model)
        for name in layer.merged_adapters
        for parameter in layer.adapter_parameters(name).values()
    }


def freeze_base(model: nn.Module) -> None:
    """Freezes every parameter that belongs to no adapter."""
    ours = {id(parameter) for _, parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad_(False)


def base_biases(model: nn.Module, bias: str) -> dict[str, nn.Parameter]:
    """The base's own biases that `bias` ("none", "lora_only" or "all") trains, by name."""
    if bias == "none":
        return {}
    if bias == "lora_only":
        return {
            f"{path}.base_layer.{layer.kind.bias}": parameter
            for path, layer in lora_layers(model)
            if (parameter := layer.get_base_layer()._parameters.get(layer.kind.bias)) is not None
        }
    ours = {id(parameter) for _, parameter in adapter_parameters(model)}
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if (name == "bias" or name.endswith(".bias"))
        and ".original_module." not in name
        and id(parameter) not in ours
    }
