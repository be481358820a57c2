"""The result of a run as ordinary files, whatever the number of processes and the way they share the weights."""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowrank.adapter_file import read_tensors
from lowrank.errors import LowrankError, some
from lowrank.sharded import whole
from lowrank.state import adapter_keys
from lowrank.train.run import processes


class SavedEmptyError(LowrankError, RuntimeError):
    """The files that were written do not hold what was trained."""


def save(model: Any, folder: Path) -> None:
    """Writes the adapters, or the whole model, into `folder`; to be called by every process.

    Weights that processes share (FSDP2, ZeRO-3) are gathered, in which all take part; the first one writes and
    opens the files again, the others wait. Raises SavedEmptyError if a tensor of an adapter is not in them whole.
    """
    adapted = hasattr(model, "peft_config")
    with together(model):
        if adapted:
            model.save_pretrained(folder, is_main_process=processes.first())
        else:
            state = gathered(model)
            if processes.first():
                model.save_pretrained(folder, **({"state_dict": state} if state else {}))
        if adapted and processes.first():
            check_saved(model, folder)
    processes.wait()


def together(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, what DeepSpeed's ZeRO-3 has split up is whole; only what is trained, that being what is saved."""
    split = [p for p in model.parameters() if hasattr(p, "ds_id") and p.requires_grad]
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed.zero.GatheredParameters(split) if deepspeed and split else nullcontext()


def gathered(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict of whole tensors on the CPU, in the first process; None if no tensor is shared out."""
    state = model.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        return None
    found = {}
    for name, tensor in state.items():
        gathered_one = whole(tensor)
        if processes.first():
            found[name] = gathered_one.cpu()
    return found


def check_saved(model: Any, folder: Path) -> None:
    """Opens the adapters in `folder` again and compares each tensor's shape with that of the model's."""
    problems = []
    for adapter in model.peft_config:
        tensors, _ = read_tensors(folder if adapter == "default" else folder / adapter)
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        for key, name in adapter_keys(model, adapter).items():
            wanted = tuple(getattr(state[name], "ds_shape", state[name].shape))
            found = tuple(tensors[key].shape) if key in tensors else "nothing"
            if found != wanted:
                problems.append(f"{key}: {found} instead of {wanted}")
    if problems:
        raise SavedEmptyError(
            f"{folder} does not hold what was trained, in {len(problems)} tensors: {some(problems)}"
        )
