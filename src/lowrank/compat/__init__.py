"""`import peft`, answered by lowrank: for libraries that know LoRA only by PEFT's names.

transformers, accelerate and others detect an adapted model with `import peft` and isinstance checks.
The folder `shim/` holds a thin `peft` package of re-exports with its dist-info; having that folder on
sys.path is the whole mechanism. No import hook, no patching; subprocesses inherit it by PYTHONPATH.
"""

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lowrank.errors import LowrankError, LowrankWarning

SHIM = str(Path(__file__).parent / "shim")
OPT_OUT = "LOWRANK_NO_PEFT_ALIAS"
MISSING = object()
# where transformers keeps PEFT's classes under module-level names
HELD = {
    "transformers.trainer_utils": ("PeftModel", "PeftMixedModel"),
    "transformers.trainer": ("PeftModel",),
}
# these take PEFT's classes into many places when they are imported: too late to replace them all
TOO_LATE = ("diffusers", "trl.trainer", "sentence_transformers")


class CompatError(LowrankError, ImportError):
    """`import peft` cannot be answered by lowrank in this process any more."""


def install(override: bool = False) -> None:
    """Let `import peft` find lowrank when no PEFT is installed; with `override`, also when one is.

    Works before and after transformers was imported. Raises CompatError when another library has
    already taken in what `import peft` gave it.
    """
    if not override and _installed_peft():
        if SHIM not in sys.path:
            sys.path.append(SHIM)  # the installed PEFT is found first
        return
    late = _late()
    if late and not is_ours():
        raise CompatError(
            f"{' and '.join(late)} was imported before lowrank.compat.install() and has taken in "
            f"{'the installed PEFT' if 'peft' in sys.modules else 'that there is no peft'}.\n"
            "Call lowrank.compat.install() before importing it."
        )
    _switch()


def append_if_no_peft() -> None:
    """What `import lowrank` does: the shim goes last on sys.path, if no `peft` is found there.

    Imports nothing. Not done if LOWRANK_NO_PEFT_ALIAS is set, nor after a library that has already taken
    in that there is no peft.
    """
    if not os.environ.get(OPT_OUT) and not _importable() and not _late():
        sys.path.append(SHIM)


@contextmanager
def standing_in() -> Iterator[None]:
    """Inside, transformers' Trainer takes our PeftModel for PEFT's; afterwards all is as it was.

    For one training in a process that may use the installed PEFT elsewhere. Not for threads.
    """
    importlib.import_module("transformers.trainer")
    path, modules, held = list(sys.path), _within_sys("peft"), _held_names()
    trl, cached = _within_sys("trl"), set(vars(sys.modules.get("trl", ModuleType(""))))
    try:
        _switch()
        yield
    finally:
        sys.path[:] = path
        _forget_peft()
        sys.modules.update(modules)
        _hand_to_transformers(held)
        # what of TRL was imported inside has taken in our names
        for name in _within_sys("trl").keys() - trl.keys():
            del sys.modules[name]
        for name in vars(trl["trl"]).keys() - cached if "trl" in trl else ():
            delattr(trl["trl"], name)


def is_ours() -> bool:
    """Whether `import peft` gives lowrank's shim here and now."""
    spec = importlib.util.find_spec("peft")
    return spec is not None and str(spec.origin).startswith(SHIM)


def ensure_recognised(model: Any) -> None:
    """Sees to it that transformers' Trainer takes `model` for an adapted one, as far as that is ours to do.

    If transformers is imported and did not find a peft, because lowrank came later, it gets ours. If it
    has the installed PEFT, that stays, and a warning says, once in a process, what to do.
    """
    recognises = getattr(sys.modules.get("transformers.trainer_utils"), "_is_peft_model", None)
    if recognises is None or recognises(model):
        return
    if is_ours() and not os.environ.get(OPT_OUT):
        install()
    elif not _warned:
        _warned.append(True)
        warnings.warn(
            f"transformers' Trainer does not recognise this {type(model).__name__} of lowrank, since it asks the "
            f"{'installed PEFT' if _importable() else 'PEFT that is not there'}: it would save whole models and "
            "report no eval loss. If you train with it, call lowrank.compat.install(override=True) at the top of "
            "your program, or run it by `python -m lowrank.compat program.py`.",
            LowrankWarning,
            stacklevel=4,
        )


_warned: list[bool] = []


def _importable() -> bool:
    """Whether there is a `peft` to import; a folder of that name without code is none."""
    spec = importlib.util.find_spec("peft")
    return spec is not None and spec.origin is not None


def _installed_peft() -> bool:
    return _importable() and not is_ours()


def _late() -> list[str]:
    return sorted({name for name in TOO_LATE for module in sys.modules if _within(module, name)})


def _switch() -> None:
    if not is_ours():
        _forget_peft()
    sys.path[:] = [SHIM, *(entry for entry in sys.path if entry != SHIM)]
    importlib.invalidate_caches()
    if any(where in sys.modules for where in HELD):
        peft = importlib.import_module("peft")
        _hand_to_transformers({at: getattr(peft, at[1]) for at in _held_names()})


def _held_names() -> dict[tuple[str, str], Any]:
    """What each name holds in the modules of HELD that are imported; MISSING if nothing yet."""
    return {
        (where, name): vars(sys.modules[where]).get(name, MISSING)
        for where, names in HELD.items()
        if where in sys.modules
        for name in names
    }


def _hand_to_transformers(values: dict[tuple[str, str], Any]) -> None:
    for (where, name), value in values.items():
        if value is MISSING:
            vars(sys.modules[where]).pop(name, None)
        else:
            setattr(sys.modules[where], name, value)
    checks = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_peft_available", "is_peft_greater_or_equal"):  # they remember their answer
        if checks is not None:
            getattr(checks, name).cache_clear()


def _within_sys(package: str) -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if _within(name, package)}


def _forget_peft() -> None:
    for name in _within_sys("peft"):
        del sys.modules[name]


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")
