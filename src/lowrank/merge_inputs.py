"""What the adapted layers of base + adapter are given: the inputs for which a merge can be rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.adapter_file import read_adapter
from lowrank.bases.ops import LINEAR
from lowrank.calibration.corda import Covariances
from lowrank.calibration.observe import PREFIX, adapted, watching
from lowrank.errors import MergeError
from lowrank.model_folder import load_base, quiet, task_of
from lowrank.peft import PeftModel


@torch.no_grad()
def input_covariances(
    base: str | Path, adapter: str | Path, examples: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """By the path of each adapted linear layer, the mean of x·xᵀ over its inputs x: (in, in), float32.

    examples: what the model is called with, "input_ids" (tokens,) or (batch, tokens); labels are left out. Loads the
    base in its own dtype, with the adapter acting. Layers that get the same input share one tensor.
    Raises MergeError if there are no examples.
    """
    file = read_adapter(adapter)
    revision = getattr(file.config, "revision", None)
    task = task_of(base, file.config.task_type, revision)
    model: Any = load_base(base, task, file.tensors, revision=revision).model
    with quiet():
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    places = {p: place for p, place in adapted(model, "default").items() if place.kind.op is LINEAR}
    seen = Covariances(places, False)
    with watching(places, seen.see):
        for example in examples:
            given = {k: torch.as_tensor(v) for k, v in example.items() if k != "labels"}
            model(**{k: v[None] if v.ndim == 1 else v for k, v in given.items()})
    found = {path.removeprefix(PREFIX): path for path in places if seen.count_of(path)}
    if not found:
        raise MergeError("There are no examples that reach an adapted linear layer.")
    return {path: seen.mean_of(name).float() for path, name in found.items()}
