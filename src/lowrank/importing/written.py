"""Translated settings as a YAML file that says where each came from."""

from collections.abc import Iterable
from typing import Any

from lowrank.importing.config import Config, Mapped, NotMapped

SECTIONS = ("model", "lora", "data", "train", "eval", "output")
SECRET = ("token", "key", "secret", "password")


def as_yaml(config: Config, mapped: Iterable[Mapped], missed: Iterable[NotMapped]) -> str:
    """The settings by section, each with its key and line beside it; below, what was not translated."""
    by_section: dict[str, list[tuple[str, str]]] = {name: [] for name in SECTIONS}
    for entry in mapped:
        section, leaf = entry.name.split(".", 1)
        by_section[section].append((f"  {leaf}: {in_yaml(entry.value)}", entry.source))
    lines = [f"# {config.path.name}, a configuration of {config.program}, as settings of lowrank"]
    for section, entries in by_section.items():
        if entries:
            width = min(max(len(text) for text, _ in entries), 44)
            lines += [f"{section}:", *(f"{text:<{width}}  # {why}" for text, why in entries)]
    for remark in config.remarks:
        lines.append(f"# note: {remark}")
    rows = [f"#   {row}" for row in missed_lines(missed)]
    return "\n".join([*lines, *(["# not translated:", *rows] if rows else [])]) + "\n"


def missed_lines(missed: Iterable[NotMapped]) -> list[str]:
    """A line for each key that was not translated; those that change what is learnt first."""
    ordered = sorted(missed, key=lambda row: not row.matters)
    return [
        f"{row.where}: {row.key}: {shown(row)}: {row.why}{'' if row.matters else ' (no effect)'}"
        for row in ordered
    ]


def shown(row: NotMapped) -> str:
    """The value, short and on one line; not if it may be a secret."""
    if row.key.lower().endswith(SECRET):
        return "…"
    text = in_yaml(row.value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def in_yaml(value: Any) -> str:
    """A value on one line."""
    import yaml

    style = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.safe_dump(
        value, default_flow_style=True, default_style=style, width=10**6, allow_unicode=True
    )
    return text.removesuffix("...\n").strip().replace("\n", " ")
