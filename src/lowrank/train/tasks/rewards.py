"""Reward functions for GRPO: rules by name, or a function of the user's own."""

import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowrank.errors import LowrankError, did_you_mean
from lowrank.train.answers import exact_match

# (prompts=, completions=, answer=, …) -> a number for each completion; None: no opinion
Reward = Callable[..., Sequence[float | None]]


class RewardError(LowrankError, ValueError):
    """A reward function that there is not, or that does not give one number a completion."""


def exact(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where a completion is the answer, white space apart."""
    return [float(exact_match(c, a)) for c, a in zip(completions, answer, strict=True)]


def final_number(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the final numbers are equal, as GSM8K is scored: behind `####`, else the last one."""
    pairs = zip(completions, answer, strict=True)
    return [float(same_number(last_number(c), last_number(a))) for c, a in pairs]


def shaped(pattern: str) -> Reward:
    """1 where the whole completion matches a regular expression; . matches line breaks too."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RewardError(f"reward format:{pattern} is no regular expression: {error}") from None

    def form(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(compiled.fullmatch(c.strip()) is not None) for c in completions]

    return form


def within(words: str) -> Reward:
    """1 up to so many words, then less by as much as it is longer, and 0 at twice as many."""
    if not words.isdecimal() or int(words) < 1:
        raise RewardError(f"reward length:{words} should name a number of words, as length:40 does")
    limit = int(words)

    def length(completions: Sequence[str], **_: Any) -> list[float]:
        return [min(1.0, max(0.0, 2 - len(c.split()) / limit)) for c in completions]

    return length


RULES: dict[str, Reward] = {"exact_match": exact, "final_number": final_number}
RULES_WITH: dict[str, Callable[[str], Reward]] = {"format": shaped, "length": within}
KNOWN = (*RULES, *(f"{name}:…" for name in RULES_WITH), "file.py:function")


def reward_functions(names: Sequence[str]) -> list[Reward]:
    """The functions behind `names`, in order; each checks what it gives. Raises RewardError."""
    return [checked(name, find(name)) for name in names]


def find(name: str) -> Reward:
    """The function that a setting names: a rule, a rule with its argument, or file.py:function."""
    if name in RULES:
        return RULES[name]
    rule, _, argument = name.partition(":")
    if rule in RULES_WITH:
        return RULES_WITH[rule](argument)
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        return _from_file(Path(path), function)
    hint = did_you_mean(rule, (*RULES, *RULES_WITH))
    raise RewardError(f"no reward {name!r}; there are {', '.join(KNOWN)}.{hint}")


def cannot_do_without(name: str, column: str) -> bool:
    """Whether the reward function behind `name` asks for a column of the rows."""
    parameter = inspect.signature(find(name)).parameters.get(column)
    return parameter is not None and parameter.default is parameter.empty


def _from_file(path: Path, function: str) -> Reward:
    if not path.is_file():
        raise RewardError(f"reward {path}:{function}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise RewardError(
            f"reward {path}:{function}: {path.name} has no function {function!r}; it has "
            f"{', '.join(functions) or 'none'}.{did_you_mean(function, functions)}"
        )
    return found


def checked(name: str, function: Reward) -> Reward:
    """`function`, given what it takes of what there is, and held to one finite number a completion."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {p.name for p in parameters}

    def call(completions: Sequence[str], **more: Any) -> list[float | None]:
        given = {"completions": completions, **more}
        lacking = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in given
        ]
        if lacking:
            raise RewardError(
                f"reward {name} asks for {', '.join(lacking)}; there are {', '.join(given)}"
            )
        values = function(**{k: v for k, v in given.items() if takes_all or k in taken})
        values = list(values)
        if len(values) != len(completions):
            raise RewardError(
                f"reward {name} gave {len(values)} numbers for {len(completions)} completions"
            )
        for value, completion in zip(values, completions, strict=True):
            if value is not None and not math.isfinite(value):
                raise RewardError(f"reward {name} gave {value} for {completion!r}")
        return values

    call.__name__ = name.partition(":")[0] if name.partition(":")[0] in RULES_WITH else name
    return call


def total(
    functions: Sequence[Reward], weights: Sequence[float], completions: Sequence[str], **more: Any
) -> list[float]:
    """For each completion the weighted sum of its rewards; what has no opinion adds nothing."""
    sums = [0.0] * len(completions)
    for function, weight in zip(functions, weights, strict=True):
        for i, value in enumerate(function(completions=completions, **more)):
            sums[i] += weight * (value or 0.0)
    return sums


def last_number(text: str) -> str | None:
    """The number behind the last `####`, or the last one at all; without separators of thousands."""
    said = text.rpartition("####")[2]
    found = re.findall(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?", said)
    return found[-1].replace(",", "") if found else None


def same_number(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and float(one) == float(other)
