"""Single values of settings: read from YAML with their lines, read from flags, checked for type."""

import math
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from lowrank.errors import did_you_mean
from lowrank.train.settings import Bound


class Wrong(ValueError):
    """Why a value cannot be used."""


class FlagValue(NamedTuple):
    """The word or words behind a flag."""

    words: str | list[str]


class Entry(NamedTuple):
    section: str
    key: str | None  # None: the section holds `value` where it should hold settings
    value: Any
    where: str  # "run.yaml:12"


def read_yaml(path: Path) -> list[Entry]:
    """Every setting of a YAML file with its line. Raises Wrong if it cannot be read or sets one twice."""
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        entries = list(_entries(root, loader, path)) if root else []
    except FileNotFoundError:
        raise Wrong(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Wrong(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise Wrong(f"{where}: not YAML: {getattr(error, 'problem', error)}") from None
    first: dict[tuple[str, str | None], str] = {}
    for entry in entries:
        name = (entry.section, entry.key)
        if name in first:
            raise Wrong(f"{entry.where}: {'.'.join(filter(None, name))} was set at {first[name]}")
        first[name] = entry.where
    return entries


def _entries(root: Any, loader: Any, path: Path) -> Iterator[Entry]:
    import yaml

    def made(node: Any) -> Any:
        return loader.construct_object(node, deep=True)

    if not isinstance(root, yaml.MappingNode):
        raise Wrong(f"{path}: expected sections such as `model:` and `train:`")
    for key, node in root.value:
        if isinstance(node, yaml.MappingNode):
            for k, v in node.value:
                yield Entry(
                    str(made(key)), str(made(k)), made(v), f"{path.name}:{k.start_mark.line + 1}"
                )
        elif made(node) is not None:  # an empty section is all defaults
            yield Entry(str(made(key)), None, made(node), f"{path.name}:{key.start_mark.line + 1}")


def check_value(value: Any, annotation: Any) -> Any:
    """`value` as `annotation` wants it; raises Wrong with what it should be."""
    bounds = []
    if get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        bounds = [extra for extra in extras if isinstance(extra, Bound)]
    found = (
        _from_words(value.words, annotation)
        if isinstance(value, FlagValue)
        else _fit(value, annotation)
    )
    for bound in bounds:
        if found is not None and not bound.holds(found):
            hint = bound.hint(found)
            raise Wrong(f"should be {bound.words}, found {found}" + (hint and f".{hint}"))
    return found


def _from_words(words: str | list[str], annotation: Any) -> Any:
    import yaml

    if isinstance(words, list) and len(words) > 1:
        return _fit(words, annotation)
    word = words if isinstance(words, str) else words[0]
    # `--data.train 2024` is a name, and `--modules_to_save lm_head` a list of one
    readings: list[Any] = [word] if isinstance(words, str) else [word, [word]]
    with suppress(yaml.YAMLError):
        readings.insert(0, yaml.safe_load(word))
    problems = []
    for reading in readings:
        try:
            return _fit(reading, annotation)
        except Wrong as wrong:
            problems.append(wrong)
    raise problems[0]


def _fit(value: Any, annotation: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for kind in args:
            try:
                return _fit(value, kind)
            except Wrong:
                continue
        raise Wrong(f"should be {_words(annotation)}, found {value!r}")
    if origin is Literal:
        if value not in args:
            hint = did_you_mean(str(value), map(str, args))
            raise Wrong(f"should be {_words(annotation)}, found {value!r}.{hint}")
        return value
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return [_fit(item, args[0] if args else Any) for item in value]
    if origin is dict and isinstance(value, dict):
        return {_fit(k, args[0]): _fit(v, args[1]) for k, v in value.items()}
    plain = _plain(value, annotation)
    if plain is REFUSED:
        raise Wrong(f"should be {_words(annotation)}, found {value!r}")
    return plain


REFUSED = object()


def _plain(value: Any, kind: Any) -> Any:
    if kind is Any:
        return value
    if kind is type(None) or value is None:
        return None if kind is type(None) and value is None else REFUSED
    if kind in (int, float) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as a string
            number = value if isinstance(value, int) else float(value)
        except (TypeError, ValueError):
            return REFUSED
        if not math.isfinite(number):
            return REFUSED
        if kind is float:
            return number
        return int(number) if int(number) == number else REFUSED
    return value if isinstance(kind, type) and isinstance(value, kind) else REFUSED


def _words(annotation: Any) -> str:
    """The annotation as a reader would say it."""
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        dict: "a mapping",
        type(None): "null",
    }
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(kind) for kind in args)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin in (list, tuple):
        return "a list"
    return names.get(
        annotation, names.get(origin, getattr(annotation, "__name__", str(annotation)))
    )
