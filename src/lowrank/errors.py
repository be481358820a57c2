"""Every exception that lowrank raises on purpose, and the nearest-name helper that their texts use."""

import difflib
from collections.abc import Iterable


class LowrankError(Exception):
    """The ancestor of all of them. Each also descends from the builtin that callers already catch."""


class LowrankWarning(UserWarning):
    """For the user to decide; the text says what to change."""


class ConfigError(LowrankError, ValueError):
    """A `LoraConfig` field has an impossible or unsupported value."""


class UnknownFieldError(LowrankError, TypeError):
    """A keyword or key that no field of the configuration has."""


class TargetError(LowrankError, ValueError):
    """The configuration does not fit the model: nothing matched, or a layer cannot do what is asked."""


class ShapeError(LowrankError, ValueError):
    """Tensors whose shapes do not go together."""


class AdapterFileError(LowrankError, ValueError, OSError):
    """An adapter's files are missing, broken, or of a form that is not loaded."""


class TensorFileError(LowrankError, ValueError, OSError):
    """A safetensors file that is broken or cut off."""


class AdapterMismatchError(LowrankError, ValueError):
    """The tensors of an adapter do not fit the model that they are loaded into."""


class BaseMismatchError(LowrankError, ValueError):
    """The adapter was trained on another base model."""


class AdapterNameError(LowrankError, ValueError):
    """An adapter's name is taken, unknown or unusable."""


class RowsError(LowrankError, ValueError):
    """adapter_names does not go with the batch, the adapters or a layer."""


class ModelFolderError(LowrankError, ValueError):
    """A model folder cannot be read, merged into, or written."""


class MergeError(LowrankError, ValueError):
    """A merge that cannot be done, or would not be finite. Unless the text says so, the base is untouched."""


class QuantisationError(LowrankError, ValueError):
    """A weight that cannot be quantised, or not this way."""


class CombineError(LowrankError, ValueError):
    """Adapters that cannot be combined, or not by that method. Nothing was written or changed."""


class ConvertError(LowrankError, ValueError):
    """An adapter that the other format cannot hold, or a file that is of none. Nothing was written."""


class HotswapError(LowrankError, ValueError, RuntimeError):
    """An adapter that cannot take another's place. Nothing was changed."""


class InitDataError(LowrankError, ValueError):
    """An initialisation from data lacks its data, or they are of no use. The model is as it was."""


class ExtractError(LowrankError, ValueError):
    """Two checkpoints of which no adapter can be made. Nothing was written."""


class NotTrainableError(LowrankError, RuntimeError):
    """A training step on a model in which nothing can be trained."""


class NotPeftError(LowrankError, TypeError):
    """`speedup` was given something else than a model with LoRA layers of the installed PEFT."""


class MissingExtraError(LowrankError, ImportError):
    """An optional package is needed; the text has the line that installs it."""


def nearest(word: str, options: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` of `options` that look most like `word`, best first; compared without case."""
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(word.lower(), by_lower, n=n, cutoff=0.5)
    return [by_lower[lower] for lower in close]


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """` Did you mean 'x' or 'y'?`, or an empty text when nothing is near."""
    close = nearest(word, options)
    return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def listed(problems: list[str]) -> str:
    """One problem as it is; several as an indented list under their count."""
    if len(problems) == 1:
        return problems[0]
    lines = "\n".join("  - " + problem.replace("\n", "\n    ") for problem in problems)
    return f"{len(problems)} problems:\n{lines}"


def some(paths: list[str]) -> str:
    """The first three, and how many more."""
    rest = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + rest
