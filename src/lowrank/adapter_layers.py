"""An adapter's tensors, layer by layer: the factors at each path, each with its own rank and alpha."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor

from lowrank.adapter_file import Adapter
from lowrank.bare_parameters import LORA_KEY, PREFIX, Bare, bare_parameters
from lowrank.bases.kinds import EXPERTS
from lowrank.lora import Lora, all_finite
from lowrank.path_patterns import pattern_value
from lowrank.start_factors import as_plain_lora

Number = TypeVar("Number", int, float)


class AdapterLayer(NamedTuple):
    """The adapter at one module. ΔW = (alpha / r)·B·A; rsLoRA's √r is in alpha."""

    A: Tensor  # as saved: (r, in), (r, in, *kernel); an embedding's is (r, num)
    B: Tensor  # as saved: (out, r), (out, r, *ones)
    alpha: float
    magnitude: Tensor | None = None  # (out,)  DoRA
    bias: Tensor | None = None  # (out,)  lora_bias
    embedding: bool = False
    bare: Bare | None = (
        None  # what of a module it adapts, by target_parameters; A and B then stack the experts'
    )

    @property
    def r(self) -> int:
        return self.A.shape[0] // self.experts

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    @property
    def experts(self) -> int:
        return 1 if self.bare is None else self.bare.experts

    @property
    def lora(self) -> Lora:
        """A and B as matrices, (experts, …) where there are several; without the magnitude."""
        if self.experts == 1:
            return Lora(self.A.flatten(1), self.B.flatten(1), self.scaling, bias=self.bias)
        A, B = EXPERTS.A_matrix(self.A, self.experts), EXPERTS.B_matrix(self.B, self.experts)
        return Lora(A, B, self.scaling)


class Read(NamedTuple):
    layers: dict[str, AdapterLayer]  # by the path in the base: the module's, or the parameter's
    rest: dict[str, Tensor]  # by key: what is saved whole (modules_to_save, biases)
    problems: list[str]  # what does not go together, a sentence each


def read_layers(adapter: Adapter, bare: Mapping[str, Bare] | None = None) -> Read:
    """The layers of an adapter, what else is in its file, and what is wrong with it.

    Of an adapter whose start was taken out of W, the layers are those of `as_plain_lora`. bare: the adapter's of
    `bare_parameters`, where other adapters were asked too. Raises AdapterFileError where that start is not known.
    """
    adapter = as_plain_lora(adapter)
    layers: dict[str, AdapterLayer] = {}
    problems: list[str] = []
    if bare is None:
        (bare,), problems = bare_parameters([adapter])
    config = adapter.config
    parts: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in adapter.tensors.items():
        match = LORA_KEY.fullmatch(key)
        if match:
            place = match[1].removeprefix(PREFIX)
            path = bare[place].path if place in bare else place.replace(".base_layer.", ".")
            part = match[2] + (".bias" if match[3] == "bias" else "")
            parts.setdefault(path, {})[part] = tensor.detach()
        else:
            rest[key] = tensor
    of_path = {found.path: found for found in bare.values()}
    for path, tensors in parts.items():
        embedding = "lora_embedding_A" in tensors or "lora_embedding_B" in tensors
        word = "lora_embedding_" if embedding else "lora_"
        A, B = tensors.get(f"{word}A"), tensors.get(f"{word}B")
        if A is None or B is None:
            problems.append(f"{path} has only one of A and B.")
            continue
        own = of_path.get(path)
        r = A.shape[0] // (own.experts if own else 1)
        told = own.r if own else pattern_value(config.rank_pattern, path, config.r)
        if B.ndim < 2 or A.ndim < 2 or B[0].numel() != A.shape[0] or told != r:
            problems.append(
                f"{path} has A {tuple(A.shape)} and B {tuple(B.shape)}, its configuration rank {told}."
            )
            continue
        if not (all_finite(A) and all_finite(B)):
            problems.append(f"{path} is not finite.")
            continue
        alpha = own.alpha if own else pattern_value(config.alpha_pattern, path, config.lora_alpha)
        m = tensors.get("lora_magnitude_vector")
        layers[path] = AdapterLayer(
            A=A,
            B=B,
            alpha=alpha * math.sqrt(r) if config.use_rslora else alpha,
            magnitude=None if m is None else m.flatten(),
            bias=tensors.get("lora_B.bias"),
            embedding=embedding,
            bare=own,
        )
    return Read(layers, rest, problems)


def pattern_of(
    values: Mapping[str, Number], default: Number, start: str = "^"
) -> dict[str, Number]:
    """rank_pattern or alpha_pattern for the paths whose value is not `default`.

    By the path's last name where the value is the same for all that end in it. start: "" if the model's
    paths may begin with more.
    """
    by_ending: dict[str, set[Number]] = {}
    for path, value in values.items():
        by_ending.setdefault(path.rpartition(".")[2], set()).add(value)
    pattern = {}
    for path, value in values.items():
        ending = path.rpartition(".")[2]
        if value != default:
            # "^": a key also matches as the end of a longer path
            key = re.escape(ending) if len(by_ending[ending]) == 1 else start + re.escape(path)
            pattern[key] = value
    return pattern
