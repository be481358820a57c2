"""The table of base layers. A kind is one row: when it applies, how W is held, how W meets x, names on disk."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Size, Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lowrank.bases import ops, stores
from lowrank.bases.ops import Op
from lowrank.bases.quantised import BACKENDS, Backend, QuantisedStore
from lowrank.bases.stores import Store
from lowrank.quantisation import Quantisation


class Layout(NamedTuple):
    """What A, B and the magnitude are called, and the shapes in which they are registered and saved.

    The shapes are PEFT's: from the weight's own shape, its (out, in) and r, each as a tuple. A_matrix and
    B_matrix: a registered tensor and the number of experts -> the view of it as (*expert, r, in) and
    (*expert, out, r), whatever rank it has room for.
    """

    A: str
    B: str
    A_shape: Callable[[Size, tuple[int, int], int], tuple[int, ...]]
    B_shape: Callable[[Size, tuple[int, int], int], tuple[int, ...]]
    magnitude_shape: Callable[[Size, tuple[int, int]], tuple[int, ...]]
    A_matrix: Callable[[Tensor, int], Tensor] = lambda A, experts: A.flatten(1)
    B_matrix: Callable[[Tensor, int], Tensor] = lambda B, experts: B.flatten(1)
    A_saved: Callable[[Tensor], Tensor] = lambda A: A  # the reverse of A_matrix, up to the shape
    B_saved: Callable[[Tensor], Tensor] = lambda B: B


class Kind(NamedTuple):
    """One row of the table."""

    name: str
    matches: Callable[[nn.Module], bool]
    weight: str  # the name of the weight parameter
    bias: str  # the name of the bias that belongs to it
    hold: Callable[[nn.Module, str], Store]
    op: Op | None  # None: through the weight
    layout: Layout
    # whether the module around this one may take the weight and compute with it, in place of calling this
    # one; it is then handed the weight with the adapters in it
    weight_taken: bool = False

    def store(self, module: nn.Module) -> Store:
        return self.hold(module, self.weight)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out, in) of the module's weight in matrix form; of one expert's, where it holds several."""
        *_, out, in_ = self.store(module).shape
        return out, in_

    def experts(self, module: nn.Module) -> int:
        """How many such matrices the weight holds: 1, but for fused experts."""
        return self.store(module).shape[:-2].numel()

    def __reduce__(self) -> tuple:
        """A copied or pickled layer refers to the same row: functions do not pickle, and rows are compared."""
        return _row, (self.name, self.weight_taken, self.weight)


def _row(name: str, weight_taken: bool, weight: str) -> Kind:
    row = next(kind for kind in (*KINDS, *QUANTISED, TRANSPOSED, *PARAMETERS) if kind.name == name)
    same = (row.weight_taken, row.weight) == (weight_taken, weight)
    return row if same else row._replace(weight_taken=weight_taken, weight=weight)


MATRIX = Layout(
    "lora_A",
    "lora_B",
    lambda weight, W, r: (r, W[1]),
    lambda weight, W, r: (W[0], r),
    lambda weight, W: (W[0],),
)
EMBEDDING = MATRIX._replace(A="lora_embedding_A", B="lora_embedding_B")
KERNEL = Layout(
    "lora_A",
    "lora_B",
    lambda weight, W, r: (r, *weight[1:]),
    lambda weight, W, r: (W[0], r, *[1] * (len(weight) - 2)),
    lambda weight, W: (1, W[0], *[1] * (len(weight) - 2)),
)
# PEFT's order: A is one expert's rows after another's, B has the experts' first columns, then their second
EXPERTS = Layout(
    "lora_A",
    "lora_B",
    lambda weight, W, r: (weight[0] * r, W[1]),
    lambda weight, W, r: (W[0], r * weight[0]),
    lambda weight, W: (weight[0], W[0]),
    A_matrix=lambda A, experts: A.reshape(experts, -1, A.shape[-1]),
    B_matrix=lambda B, experts: B.reshape(B.shape[0], -1, experts).permute(2, 0, 1),
    B_saved=lambda B: B.permute(1, 2, 0),
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, NonDynamicallyQuantizableLinear) or not isinstance(module, nn.Linear):
        return False
    # FalconLinear spells out x @ Wᵀ + b; any other forward of a subclass may do more than that
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "FalconLinear"


def is_transposed_linear(module: nn.Module) -> bool:
    return (
        type(module).__name__ == "Conv1D"
        and type(module).__module__ == "transformers.pytorch_utils"
    )


def _is_lookup(module: nn.Module) -> bool:
    if (
        not isinstance(module, nn.Embedding) or module.max_norm is not None
    ):  # max_norm rewrites W in forward
        return False
    scaled = hasattr(module, "embed_scale") and type(module).__name__.endswith(
        "ScaledWordEmbedding"
    )
    return type(module).forward is nn.Embedding.forward or scaled


def _is_convolution(module: nn.Module) -> bool:
    return any(isinstance(module, c) and type(module).forward is c.forward for c in CONVOLUTIONS)


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim >= 2 and weight.is_floating_point()


# The first row that matches decides. Rows with op=None run the module itself with the merged weight in
# place of W: exact for any module, at the cost of forming that weight in each forward.
KINDS: list[Kind] = [
    Kind("linear", _is_linear, "weight", "bias", stores.as_is, ops.LINEAR, MATRIX),
    Kind("Conv1D", is_transposed_linear, "weight", "bias", stores.transposed, ops.LINEAR, MATRIX),
    Kind("embedding", _is_lookup, "weight", "bias", stores.transposed, ops.LOOKUP, EMBEDDING),
    Kind(
        "convolution", _is_convolution, "weight", "bias", stores.flattened, ops.CONVOLUTION, KERNEL
    ),
    Kind(
        "attention in_proj",
        lambda m: isinstance(m, nn.MultiheadAttention) and m._qkv_same_embed_dim,
        "in_proj_weight",
        "in_proj_bias",
        stores.as_is,
        None,
        MATRIX,
        weight_taken=True,
    ),
    Kind(
        "embedding with its own forward",
        lambda m: isinstance(m, nn.Embedding),
        "weight",
        "bias",
        stores.transposed,
        None,
        EMBEDDING,
        weight_taken=True,
    ),
    Kind(
        "convolution with its own forward",
        lambda m: isinstance(m, CONVOLUTIONS),
        "weight",
        "bias",
        stores.flattened,
        None,
        KERNEL,
        weight_taken=True,
    ),
    Kind(
        "any module with a weight",
        _has_matrix,
        "weight",
        "bias",
        stores.flattened,
        None,
        MATRIX,
        weight_taken=True,
    ),
]

# With fan_in_fan_out=True, for modules that keep (in, out) and whose type does not say so.
TRANSPOSED = KINDS[-1]._replace(name="any module with a transposed weight", hold=stores.transposed)


def _quantised(backend: Backend) -> Kind:
    def hold(module: nn.Module, name: str) -> Store:
        return QuantisedStore(module, backend)

    return Kind(backend.name, backend.matches, backend.weight, "bias", hold, ops.LINEAR, MATRIX)


# Linear layers in few bits, looked through before the others.
QUANTISED: list[Kind] = [_quantised(backend) for backend in BACKENDS]


def quantisation_of(module: nn.Module) -> Quantisation | None:
    """How the layer's weight is rounded; None if it is no quantised layer."""
    kind = _quantised_kind(module)
    return None if kind is None else kind.store(module).quantisation


def is_quantised(module: nn.Module) -> bool:
    """Whether it is a linear layer in few bits."""
    return _quantised_kind(module) is not None


def _quantised_kind(module: nn.Module) -> Kind | None:
    return next((kind for kind in QUANTISED if kind.matches(module)), None)


def packed_sizes(model: nn.Module) -> dict[int, int]:
    """The ids of the parameters that hold weights in few bits, and how many entries of W each stands for."""
    found = {}
    for module in model.modules():
        kind = _quantised_kind(module)
        if kind is not None and kind.weight in module._parameters:
            found[id(module._parameters[kind.weight])] = kind.store(module).shape.numel()
    return found


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) entries of the model's parameters; of a quantised weight all that it stands for."""
    packed = packed_sizes(model)
    sizes = [(packed.get(id(p), p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


def kind_of(
    module: nn.Module, fan_in_fan_out: bool = False, parent: nn.Module | None = None
) -> Kind | None:
    """The first row that matches `module`, or None if it cannot carry an adapter.

    parent: the module that holds it, where it is known; some take its weight in place of calling it.
    A weight that is not a floating-point parameter of at least two dimensions (parametrised, a vector, quantised
    by a library that is not known here) matches nothing.
    """
    quantised = _quantised_kind(module)
    if quantised is not None:
        taken = isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention))
        return quantised._replace(weight_taken=True) if taken else quantised
    for kind in KINDS:
        if kind.matches(module):
            weight = module._parameters.get(kind.weight)
            if weight is None or weight.ndim < 2 or not weight.is_floating_point():
                return None
            if isinstance(parent, nn.TransformerEncoderLayer):
                return kind._replace(weight_taken=True)  # in eval mode, fused with its neighbours
            if kind is KINDS[0] and isinstance(parent, nn.MultiheadAttention):
                return KINDS[-1]  # as its own out_proj, whose forward is never called
            unknown = kind is KINDS[-1] and weight.ndim == 2 and not isinstance(module, nn.Linear)
            return TRANSPOSED if fan_in_fan_out and unknown else kind
    return None


def _bare(name: str, hold: Callable[[nn.Module, str], Store], layout: Layout) -> Kind:
    return Kind(name, lambda m: False, "", "", hold, None, layout, weight_taken=True)


# A parameter that is named itself (target_parameters), whatever module holds it: all through the weight.
PARAMETERS = [
    _bare("parameter", stores.as_is, MATRIX),
    _bare("experts", stores.as_is, EXPERTS),
    _bare("transposed experts", stores.transposed, EXPERTS),
]


def kind_of_parameter(module: nn.Module, name: str) -> Kind | None:
    """The row for the module's own parameter of that name, or None if it cannot carry an adapter.

    Two dimensions are (out, in), three are (expert, out, in), or (expert, in, out) in a module that says
    `is_transposed`, as those of transformers do. The weight of an ordinary linear layer gets that layer's row.
    """
    parameter = module._parameters.get(name)
    if parameter is None or parameter.ndim not in (2, 3) or not parameter.is_floating_point():
        return None
    if name == "weight" and _is_linear(module):
        return KINDS[0]
    matrix, experts, transposed = PARAMETERS
    if parameter.ndim == 2:
        return matrix._replace(weight=name)
    return (transposed if getattr(module, "is_transposed", False) else experts)._replace(
        weight=name
    )


def is_bare(kind: Kind) -> bool:
    """Whether the row is that of a parameter which is named itself."""
    return kind.name in [row.name for row in PARAMETERS]
