"""Every initialisation: its options, the data that it looks at, and its formula in float64."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kinds import Case
from torch import Tensor, nn

from lowrank import LoftQConfig

R = 2  # of every adapter that starts here

INITS: dict[str, dict[str, Any]] = {
    "kaiming": {"init_lora_weights": True},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)},
    "eva": {"init_lora_weights": "eva"},
    "corda ipm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
    "corda kpm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "lora_ga": {"init_lora_weights": "lora_ga"},
}
TAKEN_OUT = ("pissa", "pissa_niter_4", "olora", "corda ipm", "corda kpm", "lora_ga")
FROM_DATA = ("eva", "corda ipm", "corda kpm", "lora_ga")


def cast(case: Case, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


@dataclass
class Data:
    """What an initialisation from data looks at: some inputs, and a direction for the output of each."""

    x: list[Tensor]
    towards: list[Tensor]

    def loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        return sum((model(x) * g).sum() for x, g in zip(self.x, self.towards, strict=True))


def sample(case: Case, dtype: torch.dtype) -> Data:
    """Inputs whose features vary unequally; several, as some layers here take one vector."""
    if case.x.is_floating_point():
        along = [1] * case.x.ndim
        along[case.channel] = -1
        scale = torch.linspace(0.4, 1.8, case.x.shape[case.channel]).view(along).to(case.x.device)
        x = [cast(case, torch.randn_like(case.x) * scale, dtype) for _ in range(12)]
    else:
        x = [torch.randint_like(case.x, 11) for _ in range(12)]
    with torch.no_grad():
        y = case.call(case.layer, x[0])
    return Data(x, [torch.randn(y.shape).to(y.device, dtype) for _ in x])


@dataclass
class Base:
    """The weight that an adapter starts from and on: W = weight − out + scaling·B·A."""

    W: Tensor  # (out, in), the original
    bias: Tensor | None
    weight: Tensor  # in W's place: LoftQ's quantised one, else W
    out: Tensor | float  # taken out of it
    start: Tensor | float | None  # scaling·B₀·A₀, None if that is random


def base_of(case: Case, layer: nn.Module, init: str, s: float, data: Data, found: tuple) -> Base:
    """layer: the original one. found: A₀ and B₀ as the initialisation left them, for signs alone."""
    held = layer.get_submodule(case.place)
    W = case.W(held)
    bias = getattr(held, case.bias, None)
    bias = None if bias is None else bias.detach().double()
    if init == "random":
        return Base(W, bias, W, 0.0, None)
    if init == "loftq":
        Q = normal_float(W).to(held._parameters[case.weight].dtype).double()
        return Base(W, bias, Q, 0.0, best(W - Q))
    if init in TAKEN_OUT:
        out = formula(case, layer, init, W, s, data, found)
        return Base(W, bias, W, out, out)
    return Base(W, bias, W, 0.0, 0.0)


def formula(case, layer, init: str, W: Tensor, s: float, data: Data, found: tuple) -> Tensor:
    """s·B₀·A₀, by the paper."""
    if init.startswith("pissa"):  # Meng et al. 2024, eq. 2–4; so small a randomised SVD is exact
        return best(W)
    if init == "olora":  # Büyükakyüz 2024, Algorithm 1
        Q, upper = torch.linalg.qr(W)
        return s * Q[:, :R] @ upper[:R]
    if init.startswith("corda"):  # Yang et al. 2024, eq. 3–6
        X = met_by(case, data)
        C = X.T @ X
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        part = slice(0, R) if init == "corda ipm" else slice(len(S) - R, len(S))
        return U[:, part] @ torch.diag(S[part]) @ Vh[part] @ torch.linalg.inv(C)
    # Wang et al. 2024, theorem 3.2: A from the first r right singular vectors of the gradient, B from the
    # next r left ones, each times ⁴√out / √γ, where γ = 16; the gradient is the one of the layer's dtype
    plain = copy.deepcopy(layer).requires_grad_(True)
    data.loss(lambda x: case.call(plain, x)).backward()
    U, _, Vh = torch.linalg.svd(
        case.matrix(plain.get_submodule(case.place)._parameters[case.weight].grad.double())
    )
    U, Vh = U[:, R : 2 * R], Vh[:R]
    A, B = (t.detach().double() for t in found)
    signs = ((U.T @ B.reshape(-1, R)) * (Vh @ A.reshape(R, -1).T)).diagonal().sign()
    return s * math.sqrt(len(W)) / 16 * (U * signs) @ Vh


def best(M: Tensor) -> Tensor:
    """The best approximation of rank R."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :R] @ torch.diag(S[:R]) @ Vh[:R]


# Dettmers et al. 2023, Appendix E
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0]  # fmt: skip


def normal_float(W: Tensor) -> Tensor:
    """Blocks of 64 entries, each entry over its block's largest magnitude to the nearest of the sixteen."""
    parts = []
    for block in W.flatten().split(64):
        size = block.abs().max()
        values = torch.tensor(NF4, dtype=W.dtype)
        parts.append(values[(block[:, None] / size - values).abs().argmin(1)] * size)
    return torch.cat(parts).view(W.shape)


def met_by(case: Case, data: Data) -> Tensor:
    """The vectors that W meets, (rows, in): what a weight with a single 1 in it picks out of the input."""
    weight = case.W(case.layer)
    groups = getattr(case.layer, "groups", 1)
    columns = []
    for j in range(weight.shape[1]):
        pick = torch.zeros_like(weight)
        pick[:: weight.shape[0] // groups, j] = 1  # once for each group
        nothing = pick[:, 0] * 0
        seen = [case.truth(pick, nothing, x.double()) for x in data.x]
        channels = [y.movedim(case.channel, -1)[..., :: weight.shape[0] // groups] for y in seen]
        columns.append(torch.cat([y.flatten() for y in channels]))
    return torch.stack(columns, 1)
