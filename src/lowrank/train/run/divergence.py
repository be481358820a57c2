"""When training goes wrong while it runs: a loss that is not finite or leaves its start, layers without gradients."""

from collections.abc import Iterable, Sequence
from statistics import fmean

import torch
from torch import nn

from lowrank.errors import LowrankError, some

FIRST = 5  # steps whose mean is the start
GRADIENT_STEPS = 5  # a parameter without a gradient in so many has none


class DivergedError(LowrankError, ArithmeticError):
    """The loss, or a gradient, is no longer a finite number, or the loss stays far above its start."""


class LossWatch:
    """Whether a loss has stayed far above its start for `patience` steps on end."""

    def __init__(self, patience: int | None):
        self.patience = patience
        self.first: list[float] = []
        self.above = 0

    def problem(self, loss: float) -> str | None:
        """Takes the next step's loss; what is wrong, if something is.

        Far above: twice the mean of the FIRST steps and one more, so that neither a small loss that doubles
        nor a noisy one near 0 counts.
        """
        if loss - loss != 0:  # NaN or ±inf
            return f"the loss is {loss}"
        if len(self.first) < FIRST:
            self.first.append(loss)
        start = fmean(self.first)
        limit = start + abs(start) + 1
        self.above = self.above + 1 if loss > limit else 0
        if self.patience is None or self.above < self.patience:
            return None
        return f"the loss is {loss:.3g}, and for {self.above} steps has been above {limit:.3g}; it began at {start:.3g}"


class GradientWatch:
    """Which trainable parameters have had no gradient in any of the first GRADIENT_STEPS steps."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.without = [name for name, p in model.named_parameters() if p.requires_grad]
        self.steps = 0

    def problem(self, every_process: bool = False) -> str | None:
        """To be asked before each optimiser step; once, after GRADIENT_STEPS, what had none, if anything."""
        if self.steps >= GRADIENT_STEPS or not self.without:
            return None
        self.steps += 1
        parameters = dict(self.model.named_parameters())  # FSDP puts others in their places
        has = [_has_gradient(parameters.get(name)) for name in self.without]
        if every_process:  # a part of a tensor may be zero where others are not
            device = next(iter(parameters.values())).device
            flags = torch.tensor(has, dtype=torch.int32, device=device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            has = flags.bool().tolist()
        self.without = [name for name, found in zip(self.without, has, strict=True) if not found]
        if self.steps < GRADIENT_STEPS or not self.without:
            return None
        return (
            f"{len(self.without)} trainable parameters had no gradient, or only zeros, in the first "
            f"{GRADIENT_STEPS} steps: {some(self.without)}.\n"
            "Nothing is learnt there: the loss does not depend on these layers (experts that no token has met, "
            "a part of the model that the data does not reach), or something in between detaches."
        )


def _has_gradient(parameter: nn.Parameter | None) -> bool:
    if parameter is None or hasattr(parameter, "ds_id"):  # DeepSpeed keeps gradients to itself
        return True
    gradient = parameter.grad
    if gradient is None:
        return False
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(local.count_nonzero())


def rows_words(places: Sequence[str] | Iterable[str], limit: int = 8) -> str:
    """Places in the data as a line: `a.jsonl:3, a.jsonl:9 and 5 more`."""
    found = list(places)
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more
