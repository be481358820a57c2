"""Which modules of a model share one weight with its input embedding, and whether a configuration keeps them together."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lowrank.config import LoraConfig
from lowrank.errors import some
from lowrank.wrappers import inner


def tied_together(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig
) -> list[str]:
    """With ensure_weight_tying the input embedding and all that is tied to it; else nothing."""
    path = input_embedding(model, modules) if config.ensure_weight_tying else None
    found = twins(modules, path) if path is not None else []
    return [path, *found] if path is not None and found else []


def tying_problems(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    saved: Collection[str],
    adapted: Collection[str],
    by_row: Collection[str],
) -> list[str]:
    """Where ensure_weight_tying cannot be honoured. by_row: the paths that have trained rows."""
    if not config.ensure_weight_tying:
        return []
    tied = tied_together(model, modules, config)
    if not tied:
        return [
            f"ensure_weight_tying=True: nothing in this {type(model).__name__} is tied to its input embedding; leave it out."
        ]
    if tied[0] not in {*saved, *by_row, *adapted}:
        return [
            f"ensure_weight_tying=True: the adapter trains nothing of {tied[0]}, which {some(tied[1:])} "
            f"{'is' if len(tied) == 2 else 'are'} tied to; name it, or leave ensure_weight_tying out."
        ]
    return []


def twins(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """The paths of the other modules whose weight is that of the module at `path`."""
    module = modules[path]
    weight = module._parameters.get("weight")
    found: dict[int, str] = {}  # a module under two names counts once
    for name, other in modules.items():
        if other is not module and weight is not None and other._parameters.get("weight") is weight:
            found.setdefault(id(other), name)
    return list(found.values())


def input_embedding(model: Any, modules: Mapping[str, nn.Module]) -> str | None:
    """The path of the model's input embedding: what it says itself, else what is named `embed_tokens`."""
    try:
        module = inner(model.get_input_embeddings())
    except (AttributeError, NotImplementedError):
        named = [path for path in modules if path.rpartition(".")[2] == "embed_tokens"]
        return named[0] if len(named) == 1 else None
    return next((path for path, other in modules.items() if other is module), None)
