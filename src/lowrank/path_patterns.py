"""What a name in a configuration matches: paths, the ends of paths, and regular expressions for them."""

import re

from lowrank.config import LoraConfig
from lowrank.errors import did_you_mean


def is_or_ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def broken(pattern: str) -> str:
    """Why `pattern` is not a regular expression, or an empty text."""
    try:
        re.compile(f"({pattern})")
    except re.error as error:
        return str(error)
    return ""


def fullmatch(pattern: str, path: str, what: str, problems: list[str]) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        text = f"{what}={pattern!r} is not a regular expression: {error}. For a module's name, pass a list: [{pattern!r}]."
        if text not in problems:
            problems.append(text)
        return False


def pattern_value(pattern: dict, path: str, default):
    """The value of the first key that is the path, a suffix of it, or a regular expression for one."""
    return next((value for key, value in pattern.items() if key_matches(key, path)), default)


def key_matches(key: str, path: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({key})$", path) is not None
    except re.error:  # which pattern_problems tells
        return False


def pattern_problems(config: LoraConfig, wanted: list[str]) -> list[str]:
    problems = []
    for what in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, what):
            why = broken(key)
            if why:
                problems.append(f"{what}: {key!r} is not a regular expression: {why}.")
            elif wanted and not any(key_matches(key, path) for path in wanted):
                endings = {path.rpartition(".")[2] for path in wanted}
                problems.append(
                    f"{what}: {key!r} matches none of the targeted modules.{did_you_mean(key, endings)}"
                )
    return problems
