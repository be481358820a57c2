"""`plan(model, config)`: which layers get an adapter, and of what kind. Pure; also on the meta device."""

from dataclasses import dataclass, replace

from torch import nn

from lowrank.architectures import WEIGHT_TAKEN
from lowrank.bases.kinds import (
    EMBEDDING,
    KINDS,
    Kind,
    kind_of,
    kind_of_parameter,
)
from lowrank.bases.ops import LINEAR
from lowrank.config import LoraConfig
from lowrank.config_problems import value_problems
from lowrank.errors import TargetError, listed, some
from lowrank.layer_problems import cannot_carry, clashes, why_no_kind
from lowrank.layer_replication import stacked
from lowrank.lora import scaling_for
from lowrank.matching import (
    ALL_LINEAR,
    default_targets,
    inside_saved_modules,
    listed_under,
    matched,
    parameters_of,
    saved_paths,
    walk,
    why_never_called,
)
from lowrank.path_patterns import pattern_problems, pattern_value
from lowrank.task_types import TASK_HEADS
from lowrank.tied_weights import tied_together, tying_problems
from lowrank.token_rows import TokenTarget, token_targets
from lowrank.trainable_tokens import TrainableTokensWrapper
from lowrank.wrappers import lora_chains

ADAPTER_BYTES = 4  # float32, the default dtype of adapters


@dataclass(frozen=True)
class Target:
    """One layer, or one parameter of a module, that gets an adapter."""

    path: str  # of the module, or of the parameter where that was named itself
    kind: Kind
    out: int
    in_: int
    r: int
    lora_alpha: float
    scaling: float
    dropout: float
    method: str  # "lora" | "rslora" | "dora" | "rslora+dora"
    lora_bias: bool
    params: int
    bytes: int  # of its parameters in float32
    experts: int = 1  # how many (out, in) matrices it adapts: those of a fused mixture of experts
    parameter: str | None = None  # the parameter's name in its module, if the path ends in that
    tied_to: str | None = None  # the path of the embedding whose adapter it has, transposed

    @property
    def module_path(self) -> str:
        """The path of the module."""
        return self.path if self.parameter is None else self.path[: -len(self.parameter) - 1]


def plan(model: nn.Module, config: LoraConfig) -> list[Target]:
    """The layers of `model` that `config` adapts, in the model's order.

    Sees through adapters that are already there. Raises TargetError once, with everything that does not
    fit: names that match nothing, layers that cannot carry what is asked, indices beyond the model.
    With `layer_replication` the paths are those in the stack, which is taken down again.
    """
    with stacked(model, config.layer_replication):
        return _plan(model, config)


def _plan(model: nn.Module, config: LoraConfig) -> list[Target]:
    modules = dict(walk(model))
    problems = value_problems(config)
    saved, saved_problems = saved_paths(model, modules, config)
    problems += saved_problems
    wanted = matched(model, modules, config, saved, problems)
    leader, *followers = tied_together(model, modules, config) or [""]
    if {leader, *followers} & {*wanted}:
        wanted = [
            p for p in (*modules, *parameters_of(modules)) if p in {*wanted, leader, *followers}
        ]
    kept_whole = inside_saved_modules(model)
    parameters = parameters_of(modules)
    adapted = {
        id(chain[0].get_base_layer()): [layer.kind for layer in chain]
        for _, chain in lora_chains(model)
    }
    by_row = {
        id(module.original_module)
        for module in model.modules()
        if isinstance(module, TrainableTokensWrapper)
    }
    targets: dict[tuple[int, str], Target] = {}
    refused: dict[str, list[str]] = {}
    for path in wanted:
        module_path, parameter = parameters.get(path, (path, None))
        module = modules[module_path]
        key = (id(module), parameter or "")
        if key in targets:  # the same module under a second name
            continue
        if id(module) in kept_whole:
            reason = "saved whole by another adapter (modules_to_save); a module is either adapted or saved whole."
            refused.setdefault(reason, []).append(path)
            continue
        if id(module) in by_row:
            reason = (
                "another adapter trains some of its rows (trainable_token_indices); leave it out."
            )
            refused.setdefault(reason, []).append(path)
            continue
        lends = path == leader and followers  # its adapter acts in those that call it
        target, why_not = _target(model, modules, path, module_path, parameter, config, not lends)
        if target:
            here = [targets[k].kind for k in targets if k[0] == id(module)]
            why_not += clashes(target.kind, adapted.get(id(module), []), here)
        for reason in why_not:
            refused.setdefault(reason, []).append(path)
        if target:
            targets[key] = target
    for target in list(targets.values()):
        if target.path in followers:
            first = next((t for t in targets.values() if t.path == leader), None)
            targets[id(modules[target.path]), ""] = _follower(target, first, config, refused)
    problems += [f"{some(paths)}: {reason}" for reason, paths in refused.items()]
    problems += pattern_problems(config, wanted)
    rows, row_problems = token_targets(model, modules, config, saved, wanted)
    problems += row_problems
    problems += tying_problems(model, modules, config, saved, wanted, [row.path for row in rows])
    if problems:
        raise TargetError(listed(problems))
    return list(targets.values())


def saved_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """The paths of the modules that `config.modules_to_save` names, outermost first.

    Includes the head that a classification or question-answering task trains whole. Raises TargetError for
    names that match nothing.
    """
    paths, problems = saved_paths(model, dict(walk(model)), config)
    if problems:
        raise TargetError(listed(problems))
    return paths


def tied_saved_modules(model: nn.Module, config: LoraConfig, saved: list[str]) -> list[str]:
    """Those of `saved` whose copies share one weight (ensure_weight_tying); the input embedding first."""
    return [path for path in tied_together(model, dict(walk(model)), config) if path in saved]


def trained_rows(model: nn.Module, config: LoraConfig) -> list[TokenTarget]:
    """The embeddings and heads of which `config.trainable_token_indices` trains some rows.

    Raises TargetError for names that match nothing and indices that no row has.
    """
    modules = dict(walk(model))
    saved, _ = saved_paths(model, modules, config)
    adapted = matched(model, modules, config, saved, []) if config.trainable_token_indices else ()
    found, problems = token_targets(model, modules, config, saved, adapted)
    if problems:
        raise TargetError(listed(problems))
    return found


def resolved(
    model: nn.Module, config: LoraConfig, targets: list[Target], saved: list[str]
) -> LoraConfig:
    """`config` with its targets and modules_to_save as names that select the same ones anywhere."""
    names = config.target_modules
    if names is None:
        names = default_targets(model, config, saved)
    elif names == ALL_LINEAR:
        paths = {target.path for target in targets}
        layers = {target.path for target in targets if target.parameter is None}
        names = sorted({path.rpartition(".")[2] for path in layers})
        others = replace(config, target_modules=names)
        if set(matched(model, dict(walk(model)), others, saved, [])) != paths:
            names = sorted(layers)
    bare = config.target_parameters
    if bare and (config.layers_to_transform is not None or config.exclude_modules):
        # PEFT goes by the names alone: a file must say which parameters they are
        bare = [target.path for target in targets if target.parameter is not None]
    named = config.modules_to_save or []
    heads = [path for path in saved if path.endswith(TASK_HEADS.get(config.task_type or "", ()))]
    modules_to_save = [*named, *[path for path in heads if not path.endswith(tuple(named))]]
    return replace(
        config,
        target_modules=names,
        target_parameters=bare,
        modules_to_save=modules_to_save or None,
    )


# --- what a layer can carry -----------------------------------------------------------------------


def _target(
    model: nn.Module,
    modules: dict[str, nn.Module],
    path: str,
    module_path: str,
    parameter: str | None,
    config: LoraConfig,
    called: bool,
) -> tuple[Target | None, list[str]]:
    module = modules[module_path]
    parent = modules.get(module_path.rpartition(".")[0], model)
    kind = kind_of_parameter(module, parameter) if parameter else None
    if parameter is None or kind is KINDS[0]:
        kind = kind_of(module, config.fan_in_fan_out, parent)
    if kind is None:
        return None, [why_no_kind(module, parameter)]
    if listed_under(WEIGHT_TAKEN, model, modules, module_path):
        kind = kind._replace(weight_taken=True)
    r = pattern_value(config.rank_pattern, path, config.r)
    lora_alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
    out, in_ = kind.shape(module)
    reasons = cannot_carry(model, modules, module_path, kind, config, r)
    reasons += why_never_called(model, module_path, module) if called else []
    if isinstance(r, int) and r < 1:
        return None, reasons
    experts = kind.experts(module)
    params = experts * (r * (in_ + out) + (out if config.use_dora else 0))
    params += out if config.lora_bias else 0
    method = "+".join(
        name for name, used in [("rslora", config.use_rslora), ("dora", config.use_dora)] if used
    )
    target = Target(
        path=path,
        kind=kind,
        out=out,
        in_=in_,
        r=r,
        lora_alpha=lora_alpha,
        scaling=scaling_for(lora_alpha, r, config.use_rslora),
        dropout=config.lora_dropout,
        method=method or "lora",
        lora_bias=config.lora_bias,
        params=params,
        bytes=params * ADAPTER_BYTES,
        experts=experts,
        parameter=parameter,
    )
    return target, reasons


def _follower(
    target: Target, leader: Target | None, config: LoraConfig, refused: dict[str, list[str]]
) -> Target:
    """The target of a module that is tied to the input embedding; adds to `refused` why its adapter cannot be.

    An embedding, or a linear layer, which has the adapter transposed. DoRA normalises what the embedding's magnitude is
    of, the columns of a linear layer; a start taken out of W is the one that the embedding's W gives.
    """
    if leader is None:
        return target
    reason = ""
    ordinary = target.kind.op is LINEAR or target.kind.layout is EMBEDDING
    if leader.kind.op is None or leader.kind.layout is not EMBEDDING or not ordinary:
        reason = "its adapter cannot be that of the embedding it is tied to; both must be ordinary layers"
    elif (target.r, target.lora_alpha) != (leader.r, leader.lora_alpha):
        reason = f"its rank and alpha are not those of {leader.path}, whose adapter it has"
    if reason:
        refused.setdefault(f"{reason} (ensure_weight_tying=True).", []).append(target.path)
    return replace(target, tied_to=leader.path, params=0, bytes=0)
