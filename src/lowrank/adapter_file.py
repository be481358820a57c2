"""The adapter file: PEFT's `adapter_config.json` and `adapter_model.safetensors`, with metadata of our own.

Our metadata (the base's fingerprint, versions, the run's settings) is JSON under the key "lowrank" of the
safetensors header, which PEFT and vLLM do not read.
"""

import json
import re
import shlex
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank.config import CONFIG_NAME, LoraConfig, PeftConfig
from lowrank.errors import AdapterFileError
from lowrank.files import folder_for, replacing
from lowrank.hub import adapter_file
from lowrank.init import taken_out

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
START_NAME = "lora_start.safetensors"
METADATA_KEY = "lowrank"


class Adapter(NamedTuple):
    """A whole adapter in memory. tensors: by PEFT's keys, `base_model.model.<path>.lora_A.weight`.

    start: where the initialisation took them out of W, the factors that A and B started from, by the same keys.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    start: Mapping[str, Tensor] = {}


def read_adapter(
    path: str | PathLike, *, subfolder: str | None = None, ignore_unknown: bool = False, **hub
) -> Adapter:
    """The adapter in a folder or on the hub, its tensors on the CPU.

    ignore_unknown: drop keys of the configuration that this version does not know, with a warning.
    hub: `revision`, `token`, `cache_dir`, `local_files_only`.
    Raises AdapterFileError if a file is missing, broken, or a pickle.
    """
    config = PeftConfig.from_pretrained(path, subfolder, ignore_unknown=ignore_unknown, **hub)
    tensors, metadata = read_tensors(path, subfolder=subfolder, **hub)
    start = read_start(path, config, metadata, subfolder=subfolder, **hub)
    return Adapter(config, tensors, metadata, start)


def read_start(
    path: str | PathLike,
    config: LoraConfig,
    metadata: dict[str, Any],
    *,
    subfolder: str | None = None,
    **hub,
) -> dict[str, Tensor]:
    """The factors that the adapter started from, where they were saved beside it; else empty."""
    if "start" not in metadata and not taken_out(config.init_lora_weights):
        return {}
    weights = adapter_file(path, START_NAME, subfolder=subfolder, required=False, **hub)
    return {} if weights is None else load_tensors(weights)[0]


def read_tensors(
    path: str | PathLike, *, subfolder: str | None = None, **hub
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an adapter, and our metadata (empty if another library wrote the file)."""
    weights = adapter_file(path, WEIGHTS_NAME, subfolder=subfolder, required=False, **hub)
    if weights is None:
        pickle = adapter_file(path, PICKLE_NAME, subfolder=subfolder, required=False, **hub)
        if pickle is None:
            raise AdapterFileError(
                f"{path} has neither {WEIGHTS_NAME} nor {PICKLE_NAME}: it is not a saved adapter."
            )
        raise AdapterFileError(_pickle_text(pickle))
    tensors, header = load_tensors(weights)
    try:
        metadata = json.loads(header.get(METADATA_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise AdapterFileError(
            f"{weights}: the metadata in its header is broken: {error}"
        ) from error
    if not isinstance(metadata, dict):
        raise AdapterFileError(f"{weights}: the metadata in its header is no JSON object.")
    return tensors, metadata


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its header. Raises AdapterFileError if it is broken."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterFileError(f"{path} is not a whole safetensors file: {error}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Writes a safetensors file, reads it back and compares. Raises AdapterFileError if it cannot, or what was read differs."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        save_file(_unshared(tensors), path, metadata={"format": "pt", **header})
    except SafetensorError as error:
        raise AdapterFileError(f"{path.parent} could not be written into: {error}") from error
    _check_written(path, tensors)


def load_peft_weights(
    model_id: str | PathLike,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub,
) -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's keys, on `device` (None: the CPU), for `set_peft_model_state_dict`.

    key_mapping: {regular expression: replacement}; the first one that is found in a key, without its
    `base_model.model.`, changes it. Raises as `read_adapter`.
    """
    tensors = {}
    for key, tensor in read_tensors(model_id, **hub)[0].items():
        prefix = "base_model.model." if key.startswith("base_model.model.") else ""
        name = key.removeprefix(prefix)
        for pattern, replacement in (key_mapping or {}).items():
            name, changes = re.subn(pattern, replacement, name)
            if changes:
                break
        tensors[prefix + name] = tensor.to(device or "cpu")
    return tensors


def write_adapter(path: str | PathLike, adapter: Adapter) -> None:
    """Writes the files into the folder `path` (made if need be), each by way of a temporary name.

    The tensors are read back and compared, and both files are whole, before they take the place of older
    ones. Raises AdapterFileError if what was read differs.
    """
    folder = Path(path)
    header = {}
    metadata = {**adapter.metadata, "start": START_NAME} if adapter.start else adapter.metadata
    if metadata:
        header[METADATA_KEY] = json.dumps(metadata, sort_keys=True)
    with (
        folder_for(folder),
        replacing(folder / WEIGHTS_NAME) as weights,
        replacing(folder / CONFIG_NAME) as config,
    ):
        save_tensors(weights, adapter.tensors, header)
        config.write_text(adapter.config.to_json_string(), encoding="utf-8")
        if adapter.start:
            with replacing(folder / START_NAME) as start:
                save_tensors(start, adapter.start, {})
    if not adapter.start:
        (folder / START_NAME).unlink(missing_ok=True)  # an older adapter's


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory (tied weights) as copies: safetensors holds each on its own."""
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        found[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return found


def _check_written(path: Path, tensors: dict[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        different = set(file.keys()) ^ set(tensors)
        for key in set(file.keys()) & set(tensors):
            read, meant = file.get_tensor(key), tensors[key]
            same = read.shape == meant.shape and read.dtype == meant.dtype
            if not same or not torch.equal(_bytes(read), _bytes(meant)):
                different.add(key)
    if different:
        raise AdapterFileError(
            f"{path} does not hold what was written to it: {sorted(different)[:5]}. Is the disk full?"
        )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _pickle_text(pickle: Path) -> str:
    folder = pickle.parent
    code = (
        "import torch; from safetensors.torch import save_file; save_file({k: v.clone().contiguous() for k, v in "
        f"torch.load({str(pickle)!r}, weights_only=True).items()}}, {str(folder / WEIGHTS_NAME)!r}, {{'format': 'pt'}})"
    )
    # double quotes serve every shell, as long as nothing within means something to it
    quoted = shlex.quote(code) if set(str(pickle)) & set("\"'$`\\!%") else f'"{code}"'
    return (
        f"{folder} holds a pickle ({PICKLE_NAME}), which can run code when it is loaded; only safetensors are "
        f"loaded. To convert it, and then load that folder:\npython -c {quoted}"
    )
