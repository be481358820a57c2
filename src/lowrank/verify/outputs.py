"""The outputs of base, base+adapter and merged model on the same inputs, as one `OutputCheck`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.verify.inputs import Inputs
from lowrank.verify.result import OutputCheck


def compare_outputs(
    base: Sequence[Tensor],
    adapter: Sequence[Tensor],
    merged: Sequence[Tensor],
    inputs: Inputs,
    task: str,
    fields: Sequence[str],
) -> OutputCheck:
    """base, adapter (base+adapter), merged: for each example (positions, values), float32.

    KL and top-1 agreement are over `values` as logits, and absent where they are hidden states.
    Perplexity is over the labels of `inputs`, where there are any.
    """
    difference, effect, size = _Moments(), _Moments(), _Moments()
    kl, kl_effect, same, same_base = 0.0, 0.0, 0, 0
    for b, a, m in zip(base, adapter, merged, strict=True):
        b, a, m = b.double(), a.double(), m.double()
        difference.add(m - a)
        effect.add(a - b)
        size.add(a)
        kl += _kl(a, m)
        kl_effect += _kl(a, b)
        same += _agreements(a, m)
        same_base += _agreements(a, b)
    positions = sum(len(a) for a in adapter)
    scores = task != "FEATURE_EXTRACTION"
    return OutputCheck(
        what=", ".join(fields),
        source=inputs.source,
        inputs=len(adapter),
        positions=positions,
        max_difference=difference.largest,
        mean_difference=difference.mean,
        rms_difference=difference.rms,
        max_effect=effect.largest,
        mean_effect=effect.mean,
        effect=effect.rms,
        size=size.rms,
        kl=kl / positions if scores else None,
        kl_effect=kl_effect / positions if scores else None,
        top1_agreement=same / positions if scores else None,
        top1_agreement_base=same_base / positions if scores else None,
        perplexity_base=perplexity(base, inputs.labels, task),
        perplexity_adapter=perplexity(adapter, inputs.labels, task),
        perplexity_merged=perplexity(merged, inputs.labels, task),
        perplexity_tokens=sum(_labelled(label, task) for label in inputs.labels),
    )


class _Moments:
    """Sums of |x| and x² over many tensors, and the largest |x|; NaN counts as infinite."""

    def __init__(self) -> None:
        self.count, self.absolute, self.square, self.largest = 0, 0.0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        x = x.abs().nan_to_num(nan=math.inf)
        self.count += x.numel()
        self.absolute += x.sum().item()
        self.square += x.square().sum().item()
        self.largest = max(self.largest, x.max().item())

    @property
    def mean(self) -> float:
        return self.absolute / self.count

    @property
    def rms(self) -> float:
        return math.sqrt(self.square / self.count)


def _kl(p: Tensor, q: Tensor) -> float:
    """Σ over positions of KL(softmax p ‖ softmax q), nats."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return max(0.0, (log_p.exp() * (log_p - log_q)).sum().item())


def _agreements(p: Tensor, q: Tensor) -> int:
    return int((p.argmax(-1) == q.argmax(-1)).sum())


def _labelled(label: Tensor | None, task: str) -> int:
    if label is None:
        return 0
    return int((_targets(label, task) != -100).sum())


def _targets(label: Tensor, task: str) -> Tensor:
    """(tokens,): what each position has to predict; a causal model predicts the next token."""
    label = label.reshape(-1)
    if task != "CAUSAL_LM":
        return label
    return torch.cat([label[1:], label.new_tensor([-100])])


def losses(
    outputs: Sequence[Tensor], labels: Sequence[Tensor | None], task: str
) -> list[tuple[float, int]]:
    """Of each example with labels, the summed negative log-likelihood of its labelled tokens, and their number."""
    found = []
    for logits, label in zip(outputs, labels, strict=True):
        if label is None:
            continue
        targets = _targets(label, task)
        loss = torch.nn.functional.cross_entropy(
            logits.double(), targets, ignore_index=-100, reduction="sum"
        ).item()
        found.append((loss, int((targets != -100).sum())))
    return found


def mean_difference(
    one: Sequence[tuple[float, int]], other: Sequence[tuple[float, int]]
) -> tuple[float, float]:
    """The loss of `one` − that of `other`, nats a token over the same examples, and its standard error.

    The error is that of a ratio of two sums over the examples: Cochran, Sampling Techniques, §2.11. Infinite for one
    example.
    """
    tokens, n = sum(count for _, count in one), len(one)
    gains = [a - b for (a, _), (b, _) in zip(one, other, strict=True)]
    gain = sum(gains) / tokens
    apart = sum((g - gain * count) ** 2 for g, (_, count) in zip(gains, one, strict=True))
    return gain, math.sqrt(apart * n / (n - 1)) / tokens if n > 1 else math.inf


def perplexity(
    outputs: Sequence[Tensor], labels: Sequence[Tensor | None], task: str
) -> float | None:
    """exp of the mean negative log-likelihood of the labelled tokens; None without labels."""
    found = losses(outputs, labels, task)
    tokens = sum(count for _, count in found)
    return math.exp(min(sum(loss for loss, _ in found) / tokens, 700)) if tokens else None
