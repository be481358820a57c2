"""EVA: A from the leading directions of a layer's inputs, ranks by how much of their variance those explain.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation".
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class IncrementalSVD:
    """The leading principal components of rows that come in batches, in memory O(components · width).

    Sequential Karhunen–Loève with an updated mean (Ross et al. 2008, §2.1; EVA's algorithm 2): what is kept
    of the rows so far, the new rows less their mean, and one row for the shift of the mean are factored
    together. Twice as many directions are kept as are asked for, so that the cut costs the wanted ones
    little; with as many as the rows span, nothing is lost.
    """

    def __init__(self, width: int, components: int):
        self.components = min(components, width)
        self.kept = min(2 * self.components, width)
        self.rows = 0
        self.mean: Tensor | None = None  # (width,)
        self.scatter = 0.0  # Σ‖x − mean‖² over all rows
        self.S = torch.empty(0)  # (kept,)
        self.V = torch.empty(0, width)  # (kept, width)

    def update(self, X: Tensor) -> None:
        """Takes in X (rows, width), in its own dtype but at least float32."""
        X = X.to(torch.promote_types(X.dtype, torch.float32))
        for part in X.split(max(128, 2 * self.kept)):  # a batch of tokens may be long
            self._merge(part)

    def _merge(self, X: Tensor) -> None:
        mean, n = X.mean(0), len(X)
        centred = X - mean
        parts = [centred]
        self.scatter += float(centred.double().square().sum())
        if self.mean is None:
            self.mean = mean
        else:
            weight = self.rows * n / (self.rows + n)
            shift = mean - self.mean
            self.scatter += weight * float(shift.double().square().sum())
            parts = [self.S[:, None] * self.V, centred, (weight**0.5 * shift)[None]]
            self.mean = self.mean + shift * (n / (self.rows + n))
        self.rows += n
        stacked = torch.cat(parts)
        if len(stacked) > stacked.shape[1]:  # the same S and V, from a square factor
            stacked = torch.linalg.qr(stacked, mode="r").R
        _, S, V = torch.linalg.svd(stacked, full_matrices=False)
        self.S, self.V = S[: self.kept], _fixed_signs(V[: self.kept])

    @property
    def rank(self) -> int:
        """How many of the wanted components the rows span, beyond rounding."""
        if not len(self.S):
            return 0
        smallest = self.S[0] * torch.finfo(self.S.dtype).eps * max(self.V.shape)
        return int((self.S[: self.components] > smallest).sum())

    @property
    def explained_variance_ratio(self) -> Tensor:
        """(rank,) float64: each component's share of the variance of all rows, largest first."""
        if not self.scatter:
            return self.S[:0].double()
        return self.S[: self.rank].double().square() / self.scatter


def similarity(V: Tensor, before: Tensor) -> Tensor:
    """|cos| of each row of V with the same row of `before`, 0 where there was none yet; (len(V),)."""
    found = torch.zeros(len(V), dtype=V.dtype, device=V.device)
    both = min(len(V), len(before))
    if both:
        found[:both] = torch.cosine_similarity(V[:both], before[:both]).abs()
    return found


def redistribute(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """The rank of each layer: how many of its components are among the `budget` that explain most of all.

    ratios: each layer's explained variance ratios, largest first; as many as it may get. The ranks add up to
    the budget, or to all components if there are fewer. Equal ratios: the earlier layer, then component.
    """
    ranks = dict.fromkeys(ratios, 0)
    if not ratios:
        return ranks
    owners = [name for name, values in ratios.items() for _ in values]
    order = torch.cat([values.double().cpu() for values in ratios.values()])
    for i in order.argsort(descending=True, stable=True)[:budget].tolist():
        ranks[owners[i]] += 1
    return ranks


def directions(svd: IncrementalSVD, r: int, whiten: bool) -> Tensor:
    """A (r, in): the first r components; with `whiten` each over the root of its singular value."""
    A = svd.V[:r]
    return (A / svd.S[:r, None].sqrt() if whiten else A).clone()


def _fixed_signs(V: Tensor) -> Tensor:
    """Rows turned so that their largest entry is positive: an SVD leaves the signs open."""
    largest = V.gather(1, V.abs().argmax(1, keepdim=True))
    return V * torch.where(largest < 0, -1.0, 1.0)
