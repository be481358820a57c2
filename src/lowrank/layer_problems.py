"""Why a layer cannot carry the adapter that a configuration asks of it; a sentence each."""

from collections.abc import Callable

from torch import nn

from lowrank.architectures import BYPASSED, WEIGHT_TAKEN
from lowrank.bases.kinds import (
    EMBEDDING,
    EXPERTS,
    Kind,
    is_bare,
    is_quantised,
    is_transposed_linear,
    kind_of_parameter,
)
from lowrank.bases.ops import LINEAR
from lowrank.config import LoraConfig
from lowrank.init import taken_out
from lowrank.matching import listed_under


def cannot_carry(
    model: nn.Module,
    modules: dict[str, nn.Module],
    path: str,
    kind: Kind,
    config: LoraConfig,
    r: int,
) -> list[str]:
    """What speaks against an adapter of this kind and rank at the module `path`; empty if nothing does."""
    module = modules[path]
    reasons = [reason for applies, reason in _REFUSALS if applies(kind, module, config, r)]
    store = kind.store(module)
    reasons += filter(None, [store.refusal(trained=not config.inference_mode)])
    if config.init_lora_weights == "loftq" and store.exact and _is_shared(module, kind, modules):
        reasons.append(
            "its weight is another module's too, which quantising would untie; leave it out."
        )
    bypassed = listed_under(BYPASSED, model, modules, path)
    if bypassed:
        reasons.append(
            f"{bypassed} passes this layer's weight to a fused kernel and never calls the layer; leave it out."
        )
    taken = listed_under(WEIGHT_TAKEN, model, modules, path)
    if taken and config.lora_dropout > 0:
        reasons.append(
            f"{taken} computes with this layer's weight, where there is no input to drop from: set lora_dropout=0, or leave it out."
        )
    return reasons


def clashes(kind: Kind, adapted: list[Kind], here: list[Kind]) -> list[str]:
    """Why the module cannot take one more layer, of this kind, beside those that it has or is to have."""
    if any(k.weight == kind.weight for k in here):
        return ["named in target_modules and in target_parameters; leave it out of one of them."]
    for other in adapted + here:
        same_weight = other.weight == kind.weight
        if not (other.layout is kind.layout if same_weight else is_bare(other) and is_bare(kind)):
            whose = "another adapter" if other in adapted else "this configuration"
            what = f"its parameter {other.weight!r}" if is_bare(other) else "the module itself"
            return [f"{whose} adapts {what}; a module is adapted whole, or by its parameters."]
    return []


# What a layer cannot do: (kind, module, config, r) -> bool, and the reason that is shown.
_REFUSALS: list[tuple[Callable[[Kind, nn.Module, LoraConfig, int], bool], str]] = [
    (
        lambda kind, module, config, r: kind.op is None and config.lora_dropout > 0,
        "adapted through its weight, which has no input to drop from: set lora_dropout=0, or leave it out.",
    ),
    (
        lambda kind, module, config, r: (
            kind.layout is EXPERTS and config.use_dora and not hasattr(module, "is_transposed")
        ),
        "these fused experts do not say which way round each of them is (Llama 4's are transposed, and nothing tells), so DoRA could normalise columns for rows: set use_dora=False, or leave it out.",
    ),
    (
        lambda kind, module, config, r: is_bare(kind) and taken_out(config.init_lora_weights),
        "a parameter that is named itself cannot have a start taken out of it yet: use another init_lora_weights, or leave it out.",
    ),
    (
        lambda kind, module, config, r: is_bare(kind) and is_transposed_linear(module),
        "the weight of a Conv1D, which is transposed, and nothing in a parameter tells: name the module in target_modules.",
    ),
    (
        lambda kind, module, config, r: is_bare(kind) and config.fan_in_fan_out,
        "fan_in_fan_out=True has no meaning for a parameter that is named itself: set it to False, or leave it out.",
    ),
    (
        lambda kind, module, config, r: kind.layout is EMBEDDING and config.lora_bias,
        "an embedding has no bias: set lora_bias=False, or leave it out.",
    ),
    (
        lambda kind, module, config, r: (
            kind.op is None and config.lora_bias and getattr(module, kind.bias, None) is None
        ),
        "adapted through its weight and has no bias for lora_bias to act on.",
    ),
    (
        lambda kind, module, config, r: (
            config.lora_bias
            and getattr(module, kind.bias, None) is not None
            and getattr(module, kind.bias).shape != kind.shape(module)[:1]
        ),
        "lora_bias has an entry for each row of the weight, and this layer's bias is of another shape: set lora_bias=False, or leave it out.",
    ),
    (
        lambda kind, module, config, r: (
            config.alora_invocation_tokens is not None and (kind.op is None or not kind.op.up_onto)
        ),
        "an activated LoRA (alora_invocation_tokens) adapts linear layers only: leave it out.",
    ),
    (
        lambda kind, module, config, r: config.init_lora_weights == "orthogonal" and r % 2 == 1,
        'init_lora_weights="orthogonal" needs an even r.',
    ),
    (
        lambda kind, module, config, r: (
            (taken_out(config.init_lora_weights) or config.init_lora_weights == "loftq")
            and r > min(kind.shape(module))
            and not is_bare(kind)
        ),
        "init_lora_weights takes r directions out of the weight, which has fewer: lower r for it (rank_pattern), or leave it out.",
    ),
    (
        lambda kind, module, config, r: (
            config.init_lora_weights == "loftq"
            and (kind.op is not LINEAR or kind.layout is EMBEDDING)
        ),
        'init_lora_weights="loftq" quantises linear layers, as 4-bit loading does; leave it out, or start it another way.',
    ),
    (
        lambda kind, module, config, r: (
            config.init_lora_weights in ("eva", "corda")
            and (kind.op is None or not kind.op.floating or kind.weight_taken)
        ),
        'init_lora_weights="eva" and "corda" start from the vectors that the layer is called with, and this one gets '
        "none (token ids, or its weight is used without calling it): leave it out.",
    ),
    (
        lambda kind, module, config, r: (
            config.init_lora_weights == "corda" and getattr(module, "groups", 1) > 1
        ),
        'init_lora_weights="corda" decomposes W for one kind of input, and the groups of this convolution have each '
        "their own: leave it out.",
    ),
    (
        lambda kind, module, config, r: (
            config.init_lora_weights == "eva" and r > kind.shape(module)[1]
        ),
        'init_lora_weights="eva" needs r ≤ in: lower r for it (rank_pattern), or leave it out.',
    ),
    (
        lambda kind, module, config, r: is_quantised(module) and kind.weight_taken,
        "its module takes this layer's weight and computes with it, which works with no weight in few bits: leave it out.",
    ),
    (
        lambda kind, module, config, r: (
            is_quantised(module) and config.init_lora_weights == "loftq"
        ),
        'its weight is quantised already, and what init_lora_weights="loftq" makes up for is gone: load the base in 16 '
        "bits, or start another way and call replace_lora_weights_loftq(model), which reads the original from its files.",
    ),
    (
        lambda kind, module, config, r: (
            is_quantised(module) and config.init_lora_weights == "lora_ga"
        ),
        'init_lora_weights="lora_ga" needs the gradient of W, which a weight in few bits has not: start on the 16-bit '
        "base, or another way.",
    ),
    (
        lambda kind, module, config, r: (
            config.init_lora_weights == "lora_ga" and 2 * r > min(kind.shape(module))
        ),
        'init_lora_weights="lora_ga" needs 2r ≤ out and in: lower r for it (rank_pattern), or leave it out.',
    ),
]


def _is_shared(module: nn.Module, kind: Kind, modules: dict[str, nn.Module]) -> bool:
    weight = module._parameters[kind.weight]
    others = (other for other in modules.values() if other is not module)
    return any(weight is parameter for other in others for parameter in other._parameters.values())


def why_no_kind(module: nn.Module, parameter: str | None = None) -> str:
    name = type(module).__name__
    if parameter is not None:
        held = module._parameters[parameter]
        assert held is not None
        return f"a parameter of {held.ndim} dimensions in {held.dtype}; floating-point matrices, and stacks of them, can be adapted."
    if isinstance(module, nn.MultiheadAttention):
        return "its query, key and value have different widths and separate weights; adapt its out_proj, or leave it out."
    weight = module._parameters.get("weight")
    if weight is None:
        own = [n for n in module._parameters if kind_of_parameter(module, n) is not None]
        if own:
            return (
                f"{name} holds bare parameters; name those in target_parameters ({', '.join(own)})."
            )
        inner = [child for child, _ in module.named_children()]
        what = f"; target a layer inside it ({', '.join(inner[:6])})" if inner else ""
        return f"{name} has no weight of its own{what}."
    if weight.ndim < 2:
        return f"{name} has a vector as its weight; train it whole with modules_to_save."
    return f"{name} holds its weight as {weight.dtype}, which this version cannot adapt."
