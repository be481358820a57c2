"""Which rows of which embeddings `trainable_token_indices` means. Pure; also on the meta device."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from lowrank.bases.kinds import Kind, is_quantised, is_transposed_linear, kind_of
from lowrank.config import LoraConfig
from lowrank.errors import did_you_mean
from lowrank.layer import LoraLayer
from lowrank.matching import inside_saved_modules
from lowrank.tied_weights import input_embedding, twins
from lowrank.trainable_tokens import TrainableTokensWrapper
from lowrank.wrappers import wrappers

_SHOWN = 5


class TokenTarget(NamedTuple):
    """An embedding or output head of which some rows are trained."""

    path: str
    kind: Kind
    indices: list[int]
    tied: dict[str, Kind]  # paths of the modules that have the same weight, and follow
    width: int

    @property
    def params(self) -> int:
        return len(self.indices) * self.width


def token_targets(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    saved: Collection[str],
    adapted: Collection[str],
) -> tuple[list[TokenTarget], list[str]]:
    """What `config.trainable_token_indices` trains, and what is wrong with it.

    saved, adapted: the paths that the same configuration saves whole, and gives a LoRA.
    The modules tied to the input embedding follow it, unless the configuration names them with indices of
    their own. Any other module that is named stands alone, tied or not.
    """
    wanted, problems = _named(model, modules, config)
    embedding = input_embedding(model, modules)
    found: list[TokenTarget] = []
    followers: dict[str, Kind] = {}
    for path in sorted(wanted, key=lambda path: path != embedding):
        if path in followers:
            continue
        module, indices = modules[path], wanted[path]
        why = _why_not(model, modules, path, saved, adapted)
        if why:
            problems.append(f"trainable_token_indices: {path}: {why}")
            continue
        kind = _kind(model, modules, path)
        assert kind is not None
        rows, width = module._parameters["weight"].shape  # type: ignore[union-attr]
        problems += [f"trainable_token_indices: {path}: {p}" for p in _wrong(indices, rows)]
        tied: dict[str, Kind] = {}
        for other in twins(modules, path) if path == embedding else ():
            if set(wanted.get(other, indices)) != set(indices):
                if config.ensure_weight_tying:
                    problems.append(
                        f"ensure_weight_tying=True, and trainable_token_indices has other indices for {other} than for "
                        f"{path}, to which it is tied: name one of them."
                    )
                continue
            why = _why_not(model, modules, other, saved, adapted)
            if why:
                problems.append(f"trainable_token_indices: {other}, tied to {path}: {why}")
                continue
            other_kind = _kind(model, modules, other)
            assert other_kind is not None
            tied[other] = followers[other] = other_kind
        found.append(TokenTarget(path, kind, list(indices), tied, width))
    problems += _ties_of_other_adapters(model, modules, found)
    return found, problems


def _named(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig
) -> tuple[dict[str, list[int]], list[str]]:
    """The indices for each path that is named, and what is wrong with the names."""
    given = config.trainable_token_indices
    if not given:
        return {}, []
    if not isinstance(given, Mapping):
        path = input_embedding(model, modules)
        if path is None:
            return {}, [
                f"trainable_token_indices is a list, and {type(model).__name__} does not say which is its input "
                "embedding: give a dictionary, {name: indices}."
            ]
        return {path: list(given)}, []
    wanted: dict[str, list[int]] = {}
    problems = []
    for name, indices in given.items():
        # as PEFT, by the last letters of the path
        paths = [path for path in modules if path.endswith(name)]
        if not paths:
            endings = {path.rpartition(".")[2] for path in modules}
            hint = did_you_mean(name.rpartition(".")[2], endings)
            problems.append(f"trainable_token_indices: {name!r} matches no module.{hint}")
        for path in paths:
            if path in wanted and wanted[path] != indices:
                problems.append(f"trainable_token_indices: two names match {path}.")
            wanted[path] = list(indices)
    return wanted, problems


def _kind(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> Kind | None:
    return kind_of(modules[path], parent=modules.get(path.rpartition(".")[0], model))


def _why_not(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    path: str,
    saved: Collection[str],
    adapted: Collection[str],
) -> str:
    """Why the module at `path` cannot have some of its rows trained, or an empty text."""
    module = modules[path]
    kind = _kind(model, modules, path)
    if any(path == other or path.startswith(f"{other}.") for other in saved):
        return "it is in modules_to_save too; train the whole module or some of its rows."
    if id(module) in inside_saved_modules(model):
        return "another adapter saves it whole (modules_to_save)."
    if path in adapted:
        return "it is in target_modules too; train some of its rows or adapt it with LoRA."
    if any(layer.base_layer is module for layer in model.modules() if isinstance(layer, LoraLayer)):
        return "another adapter adapts it with LoRA."
    weight = module._parameters.get("weight")
    if is_quantised(module):
        return "its rows are in few bits, and cannot be trained; leave it out of what is quantised."
    if kind is None or kind.weight != "weight" or weight is None or weight.ndim != 2:
        return f"{type(module).__name__} has no weight with a row for each token."
    if is_transposed_linear(module):
        return "a Conv1D holds its weight as (in, out), with no row for each token."
    return ""


def _wrong(indices: list[int], rows: int) -> list[str]:
    beyond = [i for i in indices if not 0 <= i < rows]
    if beyond:
        rest = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
        return [
            f"{beyond[:_SHOWN]}{rest} are not among its rows, 0 to {rows - 1}. For new tokens, "
            "model.resize_token_embeddings(len(tokenizer)) before get_peft_model."
        ]
    return []


def _ties_of_other_adapters(
    model: nn.Module, modules: Mapping[str, nn.Module], found: list[TokenTarget]
) -> list[str]:
    """One wrapper shares the rows of its leader for every adapter, or for none."""
    leaders = {
        id(wrapper.original_module): wrapper.leader and wrapper.leader.original_module
        for _, wrapper in wrappers(model)
        if isinstance(wrapper, TrainableTokensWrapper)
    }
    wanted = [(target.path, None) for target in found]
    wanted += [(other, modules[target.path]) for target in found for other in target.tied]  # type: ignore[misc]
    return [
        f"trainable_token_indices: {path} follows its tied embedding in one adapter and not in another; give all "
        "adapters of a model the same names."
        for path, leader in wanted
        if leaders.get(id(modules[path]), leader) is not leader
    ]
