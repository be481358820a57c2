"""`import peft`, answered by lowrank: for libraries that know LoRA only by PEFT's names.

transformers, accelerate and others detect an adapted model with `import peft` and isinstance checks.
The folder `shim/` holds a thin `peft` package of re-exports with its dist-info; having that folder on
sys.path is the whole mechanism. No import hook, no patching; subprocesses inherit it by PYTHONPATH.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lowrank.errors import LowrankError

SHIM = str(Path(__file__).parent / "shim")
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
    late = sorted({name for name in TOO_LATE for module in sys.modules if _within(module, name)})
    if late and not is_ours():
        raise CompatError(
            f"{' and '.join(late)} was imported before lowrank.compat.install() and has taken in "
            f"{'the installed PEFT' if 'peft' in sys.modules else 'that there is no peft'}.\n"
            "Call lowrank.compat.install() before importing it."
        )
    _switch()


@contextmanager
def standing_in() -> Iterator[None]:
    """Inside, transformers' Trainer takes our PeftModel for PEFT's; afterwards all is as it was.

    For one training in a process that may use the installed PEFT elsewhere. Not for threads.
    """
    importlib.import_module("transformers.trainer")
    path, modules, held = list(sys.path), _peft_modules(), _held_names()
    try:
        _switch()
        yield
    finally:
        sys.path[:] = path
        _forget_peft()
        sys.modules.update(modules)
        _hand_to_transformers(held)


def is_ours() -> bool:
    """Whether `import peft` gives lowrank's shim here and now."""
    spec = importlib.util.find_spec("peft")
    return spec is not None and str(spec.origin).startswith(SHIM)


def _installed_peft() -> bool:
    return importlib.util.find_spec("peft") is not None and not is_ours()


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


def _peft_modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if _within(name, "peft")}


def _forget_peft() -> None:
    for name in _peft_modules():
        del sys.modules[name]


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")
