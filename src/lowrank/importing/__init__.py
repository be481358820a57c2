"""Run settings out of the configurations of Axolotl, LLaMA-Factory, TRL and mlx-lm.

A program is a module with a table of its keys, RULES; what it takes where nothing is said, DEFAULTS; and
MARKS, keys that tell it from the others.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lowrank.errors import did_you_mean
from lowrank.importing import axolotl, llama_factory, mlx, trl
from lowrank.importing.config import Config, ImportingError, Mapped, Unmapped, read_config
from lowrank.importing.rules import Rule


class Program(NamedTuple):
    title: str
    rules: Mapping[str, Rule]
    marks: tuple[str, ...]
    defaults: Callable[[Config], Mapping[str, Any]]


PROGRAMS = {
    "axolotl": Program("Axolotl", axolotl.RULES, axolotl.MARKS, lambda _: axolotl.DEFAULTS),
    "llama-factory": Program(
        "LLaMA-Factory", llama_factory.RULES, llama_factory.MARKS, lambda _: llama_factory.DEFAULTS
    ),
    "trl": Program("TRL", trl.RULES, trl.MARKS, trl.defaults),
    "mlx-lm": Program("mlx-lm", mlx.RULES, mlx.MARKS, lambda _: mlx.DEFAULTS),
}


def translate(
    path: Path, program: str | None = None, model: str | None = None, task: str | None = None
) -> Config:
    """The configuration with what its keys become here (`mapped`), and those that become nothing (`missed`).

    program: one of PROGRAMS; None: told from the keys. model: the base to put in place of the file's.
    task: what TRL's file is for, which its keys need not say.
    Raises ImportingError where the file cannot be read, or is of no program that is known.
    """
    config = read_config(path)
    chosen = PROGRAMS[program or recognised(config)]
    config.program, config.model, config.task = chosen.title, model, task
    config.defaults = chosen.defaults(config)
    for key, value in config.written.items():
        try:
            _map(config, key, value, chosen.rules, f"{key}, line {config.lines[key,]}")
        except Unmapped as unmapped:
            config.miss((key,), value, str(unmapped), unmapped.matters)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError):
            config.miss((key,), value, f"not a value that {chosen.title} has here")
    for key, value in config.defaults.items():
        if key not in config.written:
            with suppress(Unmapped):  # nothing in the file is lost
                _map(config, key, value, chosen.rules, f"{key}, not set: {chosen.title}'s default")
    if model is not None:
        config.mapped["model.path"] = Mapped("model.path", model, "--model")
    if task is not None:
        config.mapped["train.task"] = Mapped("train.task", task, "--task")
    return config


def _map(config: Config, key: str, value: Any, rules: Mapping[str, Rule], source: str) -> None:
    if key not in rules:
        raise Unmapped(f"not a key of {config.program}'s that is known.{did_you_mean(key, rules)}")
    found = rules[key](value, config)
    if not found:
        raise Unmapped("as it is here anyway, or taken into what another key became", matters=False)
    for name, ours in found.items():
        if key in config.written or name not in config.mapped:
            config.mapped[name] = Mapped(name, ours, source)


def recognised(config: Config) -> str:
    """The program whose marks the file bears most of. Raises ImportingError where none or several do."""
    marks = {name: sum(m in config.written for m in p.marks) for name, p in PROGRAMS.items()}
    best = max(marks.values())
    found = [name for name, count in marks.items() if count == best]
    if best and len(found) == 1:
        return found[0]
    known = {name: sum(k in p.rules for k in config.written) for name, p in PROGRAMS.items()}
    found = [name for name in found if known[name] == max(known[name] for name in found)]
    if best and len(found) == 1:
        return found[0]
    raise ImportingError(
        f"{config.path}: its keys tell no program ({', '.join(list(config.written)[:8])}).\n"
        f"Name it with --from: {', '.join(PROGRAMS)}."
    )


__all__ = ["PROGRAMS", "Config", "ImportingError", "translate"]
