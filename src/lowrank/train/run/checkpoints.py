"""Checkpoint folders that are whole or not there, and what they were made for.

A checkpoint is written under a temporary name beside its own, with `checkpoint.json`: the bytes and the CRC-32 of
each file, and the run that it belongs to. Everything is flushed to the disk before the folder gets its name.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.errors import LowrankError, listed
from lowrank.log import logger

RECORD = "checkpoint.json"
STATE = "trainer_state.json"
ENTRIES = 32  # of each weight, to tell one base from another
# what may be another when a run goes on: how long it is, and what is looked at on the way
MAY_CHANGE = (
    "train.epochs",
    "train.max_steps",
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.report_to",
    "train.divergence_steps",
)


class ResumeError(LowrankError, ValueError):
    """There is no checkpoint to go on from, or it is of another run."""


class CheckpointError(LowrankError, OSError):
    """A checkpoint could not be written. Those before it are as they were."""


def staging(output_dir: str | Path, step: int) -> Path:
    """The temporary folder in which `checkpoint-<step>` is written."""
    return Path(output_dir) / f".checkpoint-{step}.tmp"


@contextmanager
def explained(output_dir: Path, step: int) -> Iterator[None]:
    """An error in writing becomes a CheckpointError that names the last good one; what was begun is removed."""
    try:
        yield
    except LowrankError:
        raise
    except Exception as error:
        if not _in_writing(error):
            raise
        shutil.rmtree(staging(output_dir, step), ignore_errors=True)
        good = [path for path in _by_step(output_dir) if not problems(path)]
        free = shutil.disk_usage(output_dir).free
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {output_dir}: {error}\n"
            f"{free / 1e6:,.1f} MB are free there. "
            + (f"The last good one is {good[0].name}; " if good else "There is none before it; ")
            + (
                "make room and go on with --resume."
                if good
                else "make room, or choose another folder with --output."
            )
        ) from error


def _in_writing(error: Exception) -> bool:
    """Whether a file could not be written: torch and safetensors each have an error of their own for that."""
    words = ("iostream", "inline_container", "StreamWriter", "os error", "I/O error", "write")
    return isinstance(error, OSError) or any(word in str(error) for word in words)


def seal(folder: Path, run: Mapping[str, Any]) -> None:
    """Writes the record of `folder` and flushes every file and folder of it to the disk."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"run": dict(run), "files": files}, indent=1)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def install(written: Path, final: Path) -> None:
    """Renames a sealed folder to its own name; one of that name goes once the new one is there."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    written.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate(output_dir: str | Path, keep: int | None, spare: str | Path | None = None) -> None:
    """Deletes all but the `keep` newest checkpoints; `spare`, the best one, stays and counts."""
    if keep is None:
        return
    spared = Path(spare).name if spare else None
    found = _by_step(output_dir)
    kept = found[:1] + [path for path in found[1:] if path.name == spared]
    kept += [path for path in found if path not in kept][: max(keep - len(kept), 0)]
    for path in found:
        if path not in kept:
            gone = path.with_name(f".{path.name}.old")  # never half of one under its own name
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def clean(output_dir: str | Path) -> None:
    """Removes what a run that was killed had begun to write or to delete."""
    for path in Path(output_dir).glob(".checkpoint-*"):
        if path.suffix in (".tmp", ".old"):
            shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(output_dir: str | Path) -> Path:
    """The `checkpoint-N` of the largest N that is whole; what is passed over on the way is said."""
    found = _by_step(output_dir)
    for path in found:
        wrong = problems(path)
        if not wrong:
            return path
        logger.warning("%s is passed over: %s.", path, "; ".join(wrong))
    raise ResumeError(
        f"no {'whole ' if found else ''}checkpoint in {output_dir}: nothing to resume.\n"
        "Start afresh without resume, or name the checkpoint's folder."
    )


def whole(checkpoint: str | Path) -> Path:
    """`checkpoint`, if it is a whole one. Raises ResumeError with what is wrong, and the newest whole one."""
    path = Path(checkpoint)
    wrong = problems(path) if path.is_dir() else ["there is no such folder"]
    if wrong:
        others = [other.name for other in _by_step(path.parent) if not problems(other)]
        raise ResumeError(
            f"{path} is no whole checkpoint: {'; '.join(wrong)}.\n"
            + (f"Whole ones beside it: {', '.join(others)}." if others else "Start afresh.")
        )
    return path


def problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint's files; empty if it is as it was written."""
    try:
        files = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return [f"it has no {RECORD}, which is written last"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        return [f"{RECORD} cannot be read ({error})"]
    found = []
    for name, wanted in files.items():
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != wanted["bytes"]:
            found.append(f"{name} has {path.stat().st_size} of {wanted['bytes']} bytes")
        elif _crc32(path) != wanted["crc32"]:
            found.append(f"{name} is not what was written (its CRC-32 differs)")
    return found


def any_whole(output_dir: str | Path) -> bool:
    return any(not problems(path) for path in _by_step(output_dir))


def of_settings(settings: Any) -> dict[str, Any]:
    """What a checkpoint remembers of TrainSettings."""
    return {f"train.{name}": value for name, value in dataclasses.asdict(settings).items()}


def check_same_run(checkpoint: str | Path, run: Mapping[str, Any]) -> None:
    """Raises ResumeError, naming each difference, if the checkpoint is of another run than `run`.

    Only what both name is compared, without MAY_CHANGE.
    """
    path = Path(checkpoint)
    saved = json.loads((path / RECORD).read_text(encoding="utf-8"))["run"]
    now = json.loads(json.dumps(dict(run)))  # as the file has it: lists for tuples
    different = [
        f"{name}: {saved[name]!r} there, {now[name]!r} now"
        for name in now
        if name in saved and saved[name] != now[name] and name not in MAY_CHANGE
    ]
    if different:
        raise ResumeError(
            f"{path} is of another run: {listed(different)}\n"
            "Resume as it was begun, or start afresh in another folder."
        )


def data_digest(examples: Iterable[Mapping[str, Any]]) -> str:
    """A short text that is another when a row, or their order, is."""
    found = hashlib.blake2b(digest_size=8)
    for row in examples:
        for name, value in row.items():
            found.update(f"{name}={value!r};".encode())
    return found.hexdigest()


def weights_digest(model: nn.Module) -> str | None:
    """A short text for the weights that are not trained, or for all where all are; None without weights.

    Of each: name, shape, dtype and ENTRIES entries, spread evenly.
    """
    parameters = dict(model.named_parameters())
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
    found = hashlib.blake2b(digest_size=8)
    for name, parameter in (frozen or parameters).items():
        if parameter.device.type == "meta":
            return None
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        if type(parameter.data) is torch.Tensor and parameter.numel():
            flat = parameter.detach().flatten()
            places = torch.linspace(0, flat.numel() - 1, ENTRIES, dtype=torch.float64).long()
            entries = flat[places.to(flat.device)].cpu().contiguous()
            found.update(entries.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _by_step(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-N`, newest first."""
    return sorted(
        (
            path
            for path in Path(output_dir).glob("checkpoint-*")
            if path.name.split("-", 1)[1].isdigit() and path.is_dir()
        ),
        key=step_of,
        reverse=True,
    )


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found = zlib.crc32(block, found)
    return found


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
