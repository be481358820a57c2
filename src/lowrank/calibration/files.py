"""What a calibration found, in a file: safetensors, or PEFT's torch files without code in them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank.errors import InitDataError
from lowrank.files import replacing


def read_file(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """The tensors of these names, on the CPU; None if the file is not there or empty.

    Raises InitDataError if one is missing or of another shape. A file with code in it is not run.
    """
    path = Path(path)
    if not path.exists() or not path.stat().st_size:
        return None
    if path.suffix == ".safetensors":
        tensors = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    missing = [name for name in shapes if name not in tensors]
    wrong = [
        f"{name} {tuple(tensors[name].shape)}, here {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or wrong:
        found = ([f"{len(missing)} missing, {missing[0]}"] if missing else []) + wrong
        raise InitDataError(
            f"{path} was made for another model or configuration: {'; '.join(found[:3])}. Delete it, or name another."
        )
    return {name: tensors[name] for name in shapes}


def write_file(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors; as safetensors if the name ends so, else as torch.save does, for PEFT to read."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            save_file({name: tensor.clone() for name, tensor in found.items()}, temporary)
        else:
            torch.save(found, temporary)
