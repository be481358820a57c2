"""Several rows laid end to end as one, each as if it were alone.

What keeps them apart are positions that begin at 0 in each row: without a mask, transformers makes of
them a block-diagonal one (eager, sdpa, flex), or lengths for the varlen kernels (flash attention, which
wants one long row). Whether a model does so is tried on it: some take no heed of positions.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import LowrankError
from lowrank.train.data.encode import IGNORE, pad_right

Example = dict[str, list[int]]


class PackingError(LowrankError, ValueError):
    """A model in which packed rows would see each other."""


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """`examples` in rows of up to `max_length` tokens; each has input_ids, labels and position_ids.

    Longest first, each into the fullest row that still has room (best fit decreasing; within 11/9 of
    the fewest rows and one more: Johnson 1973). The first label of each example is IGNORE: nothing
    predicts it, least of all the example before.
    """
    rows: list[list[int]] = []  # indices of the examples in each
    room: list[tuple[int, int]] = []  # (tokens left, row), in order
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"])):
        tokens = len(examples[i]["input_ids"])
        at = bisect_left(room, (tokens, -1))
        left, row = room.pop(at) if at < len(room) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(room, (left - tokens, row))
    return [_joined([examples[i] for i in sorted(row)]) for row in rows]


def _joined(examples: Sequence[Example]) -> Example:
    return {
        "input_ids": [token for e in examples for token in e["input_ids"]],
        "labels": [label for e in examples for label in (IGNORE, *e["labels"][1:])],
        "position_ids": [i for e in examples for i in range(len(e["input_ids"]))],
    }


def collate_packed(pad_id: int, flat: bool) -> Callable[[list[Example]], dict[str, Any]]:
    """A collator for packed rows: ids, labels and positions (rows, longest), or (1, tokens) if `flat`.

    Padding is one more example at the end, which no other sees.
    """

    def joined(rows: list[Example]) -> dict[str, Any]:
        if flat:
            rows = [{key: [x for row in rows for x in row[key]] for key in rows[0]}]
        width = max(len(row["input_ids"]) for row in rows)

        def filled(key: str, padding: Callable[[int], list[int]]) -> Tensor:
            return torch.tensor([row[key] + padding(width - len(row[key])) for row in rows])

        return {
            "input_ids": filled("input_ids", lambda n: [pad_id] * n),
            "labels": filled("labels", lambda n: [IGNORE] * n),
            "position_ids": filled("position_ids", lambda n: list(range(n))),
            "use_cache": False,  # with a cache, transformers does not look for packed rows
        }

    return joined


def collate(pad_id: int, flat: bool) -> Callable[[list[Example]], dict[str, Any]]:
    """A collator for packed rows and for others, as evaluation has them."""
    padded, packed = pad_right(pad_id), collate_packed(pad_id, flat)
    return lambda rows: (packed if "position_ids" in rows[0] else padded)(rows)


def wants_flat(model: nn.Module) -> bool:
    """Whether the model's attention keeps packed rows apart only in a batch of one."""
    return "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Raises PackingError if tokens of packed rows see those of others, or count positions on.

    Three short rows are packed twice, with another first one; the others' logits have to stay, and to be
    those of the rows alone.
    """
    configs = getattr(model, "peft_config", {})
    if any(getattr(c, "alora_invocation_tokens", None) for c in configs.values()):
        raise PackingError(
            "train.packing: an activated LoRA begins at its invocation in each row of a batch, of "
            "which packed rows are but one.\nSet train.packing to false."
        )
    weight = next(model.parameters())
    random = torch.Generator().manual_seed(0)
    high = min(model.config.get_text_config().vocab_size, 1000)
    first, other, second, third = (
        torch.randint(high, (n,), generator=random).tolist() for n in (7, 7, 5, 6)
    )
    alone = [_logits(model, [row], weight.device) for row in (second, third)]
    packed = [_logits(model, [start, second, third], weight.device)[7:] for start in (first, other)]
    scale = 16 * torch.finfo(weight.dtype if weight.is_floating_point() else torch.bfloat16).eps
    limit = max(scale, 1e-4) * packed[0].abs().max()
    reason = None
    if not packed[0].isfinite().all():
        reason = "the logits are not finite, so that nothing can be told"
    elif not (packed[0] - packed[1]).abs().max() <= limit:
        reason = "tokens of one packed row see those of another"
    elif not (packed[0] - torch.cat(alone)).abs().max() <= limit:
        reason = "a packed row is not what it is alone: its positions count on from the one before"
    if reason:
        raise PackingError(
            f"train.packing: in {type(_bare(model)).__name__} ({_attention(model)}), {reason}.\n"
            "Set train.packing to false: rows of like length then share a batch."
        )


def _logits(model: Any, rows: list[list[int]], device: torch.device) -> Tensor:
    example = _joined([{"input_ids": row, "labels": row} for row in rows])
    batch = collate_packed(0, flat=False)([example])
    labels = batch.pop("labels")
    training = model.training
    model.eval()
    try:
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        logits = model(**inputs).logits
    except (TypeError, ValueError) as error:
        raise PackingError(
            f"train.packing: {type(_bare(model)).__name__} does not take packed rows: {error}\n"
            "Set train.packing to false."
        ) from None
    finally:
        model.train(training)
    assert logits.shape[1] == labels.shape[1]
    return logits[0].float()


def _bare(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _attention(model: Any) -> str:
    return f"attention: {getattr(model.config, '_attn_implementation', 'its own')}"
