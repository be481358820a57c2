"""What an adapter trained on a quantised base is merged onto: both candidates, against what training saw.

Training saw Q + ΔW, Q the quantised weight. Merged into 16 bits that can be written as it is ("dequantised"), or ΔW
goes onto the weight that Q was made of ("original"). Which is the better model is not known before it is measured:
the original has no quantisation error, and ΔW was not trained for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.adapter_file import Adapter
from lowrank.model_folder import TASKS, load_base, quiet
from lowrank.quantisation import Quantisation
from lowrank.quantised_base import in_words, round_weights
from lowrank.verify import probe
from lowrank.verify.inputs import Example, Inputs, inputs_for
from lowrank.verify.outputs import compare_outputs, losses, mean_difference, perplexity
from lowrank.verify.result import DEQUANTISED, ONTO, ORIGINAL, Candidates
from lowrank.wrappers import lora_layers

_SURE = 2.0  # standard errors by which the original's loss has to be lower


class _Outputs(NamedTuple):
    base: list[Tensor]
    adapter: list[Tensor]  # base + adapter
    merged: list[Tensor]  # the same, rounded as it would be written


@torch.no_grad()
def compare_candidates(
    base: str | Path,
    adapter: str | Path,
    file: Adapter,
    layers: Mapping[str, Quantisation],
    task: str,
    dtype: torch.dtype,
    given: Sequence[str | Example] | None = None,
    seed: int = 0,
) -> Candidates:
    """Both candidates, measured. Loads `base`, which is in 16 or 32 bits, twice in float32, one after the other.

    adapter: the folder that `file` was read from. layers: by path, how the base was quantised. dtype: what the
    adapted weights are to be written in. given: inputs as `verify` takes them.
    """
    revision = getattr(file.config, "revision", None)

    def run(inputs: Inputs | None, quantised: bool) -> tuple[Inputs, _Outputs]:
        model: Any = load_base(
            base, task, file.tensors, dtype=torch.float32, revision=revision
        ).model
        if quantised:
            round_weights(model, layers)
        inputs = inputs or inputs_for(model, task, (adapter, base), revision, given, seed)
        return inputs, _outputs(model, adapter, inputs, layers, task, dtype)

    inputs, seen = run(None, True)
    _, other = run(inputs, False)
    fields = TASKS[task][1]
    checks = [
        compare_outputs(seen.base, seen.adapter, merged, inputs, task, fields)
        for merged in (seen.merged, other.merged)
    ]
    found = Candidates(
        quantisation=in_words(layers),
        dtype=str(dtype).removeprefix("torch."),
        dequantised=checks[0],
        original=checks[1],
        original_base=perplexity(other.base, inputs.labels, task),
    )
    return _decided(
        found,
        losses(seen.merged, inputs.labels, task),
        losses(other.merged, inputs.labels, task),
    )


def _outputs(
    model: Any,
    adapter: str | Path,
    inputs: Inputs,
    layers: Mapping[str, Quantisation],
    task: str,
    dtype: torch.dtype,
) -> _Outputs:
    from lowrank.peft import PeftModel

    def outputs(model: Any) -> list[Tensor]:
        return [probe.outputs_of(model, one, TASKS[task][1]) for one in inputs.examples]

    base = outputs(model)
    with quiet():
        live = PeftModel.from_pretrained(model, str(adapter), check_base=False).eval()
    added = outputs(live)
    names = {path.removeprefix("base_model.model.") for path, _ in lora_layers(live)} | {*layers}
    with quiet():
        merged = live.merge_and_unload()
    for name, weight in merged.named_parameters():
        if name.removesuffix(".weight") in names:
            weight.copy_(weight.to(dtype))
    return _Outputs(base, added, outputs(merged))


def _decided(
    found: Candidates, seen: list[tuple[float, int]], other: list[tuple[float, int]]
) -> Candidates:
    """`found` with the verdict. The original is written only if its loss is lower beyond what chance explains."""
    if not sum(count for _, count in seen):
        shares = {name: check.relative_difference or 0.0 for name, check in found.by_name.items()}
        onto = min(ONTO, key=lambda name: shares[name])
        why = (
            "no labelled rows to compare losses on; its outputs are the nearest to those of training: off by "
            f"{shares[onto]:.2%} of the adapter's effect, the other by {max(shares.values()):.2%}"
        )
        return replace(found, onto=onto, why=why)
    gain, error = mean_difference(seen, other)
    by = f"by {abs(gain):.4f} ± {error:.4f} nats a token"
    if gain > _SURE * error:
        onto, why = ORIGINAL, f"its loss is lower {by}"
    elif gain < -_SURE * error:
        onto, why = DEQUANTISED, f"its loss is lower {by}"
    else:
        onto, why = (
            DEQUANTISED,
            f"the losses differ {by}, which may be chance, and this one was trained",
        )
    return replace(found, gain=gain, gain_error=error, onto=onto, why=why)
