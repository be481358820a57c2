"""PEFT's folders: `adapter_config.json` beside `adapter_model.safetensors`; one folder for each component."""

from collections.abc import Mapping
from pathlib import Path

from lowrank.adapter_file import WEIGHTS_NAME, Adapter, read_adapter, write_adapter
from lowrank.config import CONFIG_NAME
from lowrank.formats.layers import KINDS, Options

HOLDS = frozenset(KINDS)


def read(path: Path, options: Options) -> dict[str, Adapter]:
    """By component, the names of the folders; an adapter by itself (here or on the Hub) is that of ""."""
    parts = components(path)
    return (
        {name: read_adapter(path / name) for name in parts} if parts else {"": read_adapter(path)}
    )


def components(path: Path) -> list[str]:
    """The folders in `path` that hold adapters, if it holds none itself."""
    if not path.is_dir() or (path / CONFIG_NAME).exists() or (path / WEIGHTS_NAME).exists():
        return []
    return sorted(inner.parent.name for inner in path.glob(f"*/{CONFIG_NAME}"))


def write(path: Path, adapters: Mapping[str, Adapter], options: Options) -> list[Path]:
    for name, adapter in adapters.items():
        write_adapter(path / name, adapter)
    return [path / name / file for name in adapters for file in (WEIGHTS_NAME, CONFIG_NAME)]
