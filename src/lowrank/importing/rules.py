"""What becomes of one key: a rule gives our settings for its value, or says why there are none."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from lowrank.importing.config import Config, Unmapped

# (value, the whole configuration) -> {name of a setting: its value}; {}: another key's rule takes it in
Rule = Callable[[Any, Config], Mapping[str, Any]]

NOTHING = (None, False, "", 0, "no", "none", "None")


def to(name: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The same thing under another name."""
    return lambda value, config: {name: convert(value)}


def choice(name: str, table: Mapping[Any, Any]) -> Rule:
    """The same choice among other words."""

    def rule(value: Any, config: Config) -> dict[str, Any]:
        word = value.lower() if isinstance(value, str) else value
        if word not in table:
            raise Unmapped(
                f"there is no {value!r} here; of {config.program}'s: {', '.join(map(str, table))}"
            )
        return {name: table[word]}

    return rule


def no_effect(why: str) -> Rule:
    """A key that does not change what is learnt."""

    def rule(value: Any, config: Config) -> dict[str, Any]:
        raise Unmapped(why, matters=False)

    return rule


def unsupported(why: str, neutral: Iterable[Any] = NOTHING) -> Rule:
    """A key that changes what is learnt, unless its value is one of `neutral`."""
    off = list(neutral)

    def rule(value: Any, config: Config) -> dict[str, Any]:
        with suppress(TypeError, ValueError):  # YAML reads 1e-8 as a string
            value = float(value) if isinstance(value, str) else value
        if value in off or value == [] or value == {}:
            raise Unmapped("as it is here anyway", matters=False)
        raise Unmapped(why)

    return rule


def taken(value: Any, config: Config) -> dict[str, Any]:
    """A key that the rule of another one reads."""
    return {}


def alike(rule: Rule, *keys: str) -> dict[str, Rule]:
    """One rule for several keys."""
    return dict.fromkeys(keys, rule)


def words(value: Any) -> list[str]:
    """A list, also where it is written as `a, b`."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return list(value)


SPEED = no_effect("how fast it runs, or in how much memory; the result is the same")
PLACE = no_effect("where and in how many processes it runs: docs/train.md")
TELLING = no_effect("what is shown or kept of a run; log.jsonl and the report are always written")
CACHE = no_effect("nothing is prepared ahead or cached here")
EVALUATION = no_effect("how results are measured, not what is learnt")
