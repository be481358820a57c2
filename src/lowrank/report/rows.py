"""Rows as a model reads them, with what is learnt in colour and between marks."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

LEGEND = Text.assemble(" ", ("⟦learnt⟧", "bold green"), (" read only", "dim"))


def row_view(title: str, parts: Iterable[tuple[str, bool]], limit: int = 2000) -> RenderableType:
    """One row under its title; parts: (text, whether it is learnt), of which `limit` characters show.

    What is left out is the middle of a part, and its length is said.
    """
    parts = list(parts)
    text = Text(overflow="fold")
    share = max(limit // max(len(parts), 1), 60)
    for said, learnt in parts:
        style = "bold green" if learnt else "dim"
        shown = _shortened(said, share)
        text.append(f"⟦{shown}⟧" if learnt else shown, style)
    return Group(Text(f" {title}", "bold"), Padding(text, (0, 1, 1, 3)))


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit + 40:  # the remark takes room too
        return text
    left, right = limit * 2 // 3, limit // 3
    return f"{text[:left]} … {len(text) - left - right:,} characters … {text[-right:]}"
