"""A model folder in the making: whole or not there; and what lies in it beside the weights."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank.errors import MergeError
from lowrank.model_files import file_of, has_tokenizer
from lowrank.model_folder import quiet

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def check_out(out: Path, sources: Iterable[str | Path | None], overwrite: bool) -> None:
    """Raises MergeError if `out` is read, or holds something that is not to be replaced."""
    for source in sources:
        if (
            source
            and Path(source).exists()
            and Path(source).resolve().is_relative_to(out.resolve())
        ):
            raise MergeError(
                f"{out} is or holds {source}, which the merge reads. Name another output folder."
            )
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise MergeError(
            f"{out} exists. Name another output folder, or overwrite it (--overwrite)."
        )


@contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` in one rename, or nothing at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    work.mkdir()
    try:
        yield work
        if out.exists():
            out.rename(old)
        work.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for rest in (work, old):
            shutil.rmtree(rest, ignore_errors=True)


def copy_rest(
    folder: Path, base: str, revision: str | None, tokenizers: Iterable[tuple[str, str | None]]
) -> str | None:
    """What lies beside the weights of a model: the base's, and the first tokenizer, whose folder is returned.

    tokenizers: (folder or name on the Hub, revision).
    """
    for name in (GENERATION, *PROCESSOR_FILES):
        _copy(base, name, revision, folder)
    for source, at in tokenizers:
        if has_tokenizer(source, at):
            _copy_tokenizer(source, at, folder)
            return source
    return None


def _copy_tokenizer(source: str, revision: str | None, folder: Path) -> None:
    """The tokenizer's files, byte for byte; its class says what they are called."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except Exception as error:  # tokenizers raises just this
        raise MergeError(
            f"{source} has a tokenizer that transformers cannot read: {error}"
        ) from error
    for name in {*TOKENIZER_FILES, *tokenizer.vocab_files_names.values()}:
        _copy(source, name, revision, folder)
    templates = Path(source) / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _copy(source: str, name: str, revision: str | None, folder: Path) -> None:
    path = file_of(source, name, revision)
    if path is not None:
        shutil.copyfile(path, folder / name)
