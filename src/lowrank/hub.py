"""Where an adapter's files are: in a folder, or on the Hugging Face hub."""

import re
from os import PathLike
from pathlib import Path

from lowrank.errors import AdapterFileError, MissingExtraError

# the keywords of huggingface_hub.hf_hub_download that loading accepts
HUB_KEYWORDS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "tqdm_class",
)
# keywords of transformers' from_pretrained that callers pass along, and that mean nothing for an adapter's
# files: they hold no code, and huggingface_hub takes its proxies from the environment
FOREIGN_KEYWORDS = ("trust_remote_code", "code_revision", "proxies")

REPO_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


def adapter_file(
    name_or_path: str | PathLike,
    filename: str,
    *,
    subfolder: str | None = None,
    required: bool = True,
    **hub,
) -> Path | None:
    """The local path of one of an adapter's files, downloaded if `name_or_path` is a hub id.

    Raises AdapterFileError if it is not there (returns None if not `required`).
    """
    folder = Path(name_or_path)
    if folder.is_dir() and str(name_or_path):
        path = folder / (subfolder or "") / filename
        if path.is_file():
            return path
        if not required:
            return None
        there = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise AdapterFileError(
            f"{path.parent} has no {filename}. It has: {', '.join(there[:10]) or 'nothing'}."
        )
    name = str(name_or_path)
    # a few old base models have an id without an owner: looked up in the cache, never asked for
    if not REPO_ID.fullmatch(name) or ("/" not in name and not hub.get("local_files_only")):
        raise AdapterFileError(f"{name} is no folder here, and no hub id (owner/name) either.")
    known = {key: value for key, value in hub.items() if key not in FOREIGN_KEYWORDS}
    return _download(name, filename, subfolder, required, known)


def _download(
    repo_id: str, filename: str, subfolder: str | None, required: bool, hub: dict
) -> Path | None:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError(
            f"{repo_id} is no folder here; to load it from the hub: pip install huggingface_hub"
        ) from error
    wanted = f"{subfolder}/{filename}" if subfolder else filename
    try:
        return Path(hf_hub_download(repo_id, filename, subfolder=subfolder, **hub))
    except LocalEntryNotFoundError as error:
        raise AdapterFileError(
            f"{repo_id} is no folder here, and its {wanted} is not in the hub's cache either: {error}"
        ) from error
    except EntryNotFoundError as error:
        if not required:
            return None
        raise AdapterFileError(f"{repo_id} on the hub has no {wanted}.") from error
    except (OSError, ValueError) as error:
        # "Force download failed due to the above error"
        cause = error.__cause__ or error if type(error) is ValueError else error
        raise AdapterFileError(
            f"{repo_id} is no folder here, and the hub did not give its {wanted}: {cause}"
        ) from error


def check_if_peft_model(model_name_or_path: str | PathLike) -> bool:
    """Whether an adapter's configuration is in that folder, or in that repository of the hub."""
    try:
        return adapter_file(model_name_or_path, "adapter_config.json", required=False) is not None
    except (AdapterFileError, ImportError):
        return False
