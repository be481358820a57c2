"""Activated LoRA: an adapter that acts from the last occurrence of its invocation tokens on.

What comes before is computed by the base alone, so that its keys and values can be shared with the base
and with other such adapters (Greenewald et al. 2025, "Activated LoRA"). Where each row's adapter starts is
found once for a forward or a `generate`, and shared with all layers through their `Routing`.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import RowsError
from lowrank.preparing import checkpoints_activations
from lowrank.routing import Routing

NEVER = torch.iinfo(torch.int64).max  # the start of a row without the invocation


def invocation_starts(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Where `tokens` occur last in each row of ids (rows, positions): (rows,); NEVER if they do not."""
    n = len(tokens)
    if ids.shape[1] < n:
        return torch.full_like(ids[:, 0], NEVER, dtype=torch.int64)
    wanted = torch.tensor(tokens, device=ids.device)
    found = (ids.unfold(1, n, 1) == wanted).all(-1)  # (rows, positions − n + 1)
    last = found.shape[1] - 1 - found.flip(1).int().argmax(1)
    return torch.where(found.any(1), last, NEVER)


@contextmanager
def activated(
    model: nn.Module,
    routing: Routing,
    args: tuple,
    kwargs: Mapping[str, Any],
    names: Sequence[str],
    offsets: Sequence[int | None] | None = None,
    *,
    generating: bool = False,
) -> Iterator[Callable[[Any], Any]]:
    """Inside, activated adapters among `names` know where in the rows of the model's input they start.

    model: the base model, whose layers share `routing`. args, kwargs: of its forward or (`generating`) generate. offsets: for each row how many
    positions from its end the adapter starts, None for never; else they are found in the token ids.
    What it gives is to be called with the forward's output, and returns it: with activation checkpointing
    the starts then stay until the next forward, since the backward pass runs the layers again.
    Raises RowsError where the starts cannot be known.
    """
    waiting = {name: routing.invocations[name] for name in names if name in routing.invocations}
    if not waiting:
        if offsets is not None:
            raise RowsError("alora_offsets were given, and no adapter with invocation tokens runs.")
        yield lambda output: output
        return
    ids, length = _ids(args, kwargs, generating)
    before = routing.starts, routing.end, routing.length
    awaited = routing.awaited() if routing.awaited is not None else None
    if awaited is not None and torch.is_grad_enabled() and not generating:
        raise RowsError(
            "With activation checkpointing, call backward() after each forward of an activated LoRA: the backward "
            "pass runs the layers again, and they know one forward's starts only."
        )
    hook = None
    if generating:
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: _place(routing, args, kwargs), with_kwargs=True
        )
    elif offsets is None and _seen(kwargs):
        raise RowsError(
            "The tokens of past_key_values are not here to be searched for the invocation: pass "
            "alora_offsets=[…], each row's distance from its end to where the invocation starts, or use generate."
        )
    seen = 0 if generating else _seen(kwargs)
    routing.end, routing.length = seen + length, length
    if offsets is not None:
        device = ids.device if ids is not None else None
        ends = [NEVER if o is None else seen + length - int(o) for o in offsets]
        routing.starts = dict.fromkeys(waiting, torch.tensor(ends, device=device))
    elif ids is None:
        raise RowsError(
            "An activated LoRA looks for its invocation in input_ids, which are not given: pass alora_offsets=[…]."
        )
    else:
        routing.starts = {name: invocation_starts(ids, t) for name, t in waiting.items()}
    kept = False

    def finished(output: Any) -> Any:
        nonlocal kept
        if model.training and checkpoints_activations(model) and torch.is_grad_enabled():
            kept = _await_backward(routing, output)
        return output

    try:
        yield finished
    finally:
        if hook is not None:
            hook.remove()
        if not kept:
            routing.starts, routing.end, routing.length = before


def _await_backward(routing: Routing, output: Any) -> bool:
    """Notes that a backward pass from `output` is to come; False if none can."""
    values = output.values() if isinstance(output, Mapping) else (output,)
    tensor = next((t for t in values if isinstance(t, Tensor) and t.requires_grad), None)
    if tensor is None:
        return False
    routing.awaited = weakref.ref(tensor)
    tensor.register_hook(lambda grad: setattr(routing, "awaited", None))
    return True


def _ids(args: tuple, kwargs: Mapping[str, Any], generating: bool) -> tuple[Tensor | None, int]:
    """The token ids (rows, positions), if there are any, and how many positions the input has."""
    ids = kwargs.get("input_ids")
    ids = kwargs.get("inputs") if ids is None and generating else ids
    ids = args[0] if ids is None and args and isinstance(args[0], Tensor) else ids
    if ids is not None:
        ids = ids[None] if ids.ndim == 1 else ids
        return ids, ids.shape[1]
    embeddings = kwargs.get("inputs_embeds")
    return None, 0 if embeddings is None else embeddings.shape[1]


def _seen(kwargs: Mapping[str, Any]) -> int:
    """How many positions the cache holds."""
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _place(routing: Routing, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Each forward of `generate` sees the positions that come after those in the cache."""
    _, routing.length = _ids(args, kwargs, generating=False)
    routing.end = _seen(kwargs) + routing.length
