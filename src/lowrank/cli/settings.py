"""Settings of a run: defaults, a YAML file, flags. Every value knows where it came from."""

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from lowrank.cli.values import FlagValue, Wrong, check_value, read_yaml
from lowrank.config import LoraConfig
from lowrank.errors import LowrankError, did_you_mean, listed
from lowrank.train.settings import READING as READING_NAMES
from lowrank.train.settings import DataSettings, EvalSettings, TrainSettings, misplaced
from lowrank.train.tasks.table import TASKS, Task


class SettingsError(LowrankError, ValueError):
    """Settings that cannot be used, all of them in one text."""


@dataclass(frozen=True)
class ModelSettings:
    path: Annotated[str | None, "a model folder, a name on the Hub, or embedded"] = None
    revision: Annotated[str | None, "branch, tag or commit on the Hub"] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], "auto: float32 on a CPU, else as stored"
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], "auto: cuda if there is one"] = "auto"
    quantize: Annotated[
        Literal["none", "nf4", "fp4", "int8"], "round the weights of the linear layers: QLoRA"
    ] = "none"
    double_quant: Annotated[bool, "4 bits: the scales in 8 bits too"] = True
    quantize_backend: Annotated[
        Literal["auto", "bitsandbytes", "torchao", "lowrank"],
        "auto: 4 bits by bitsandbytes where it is installed, else lowrank",
    ] = "auto"


@dataclass(frozen=True)
class OutputSettings:
    dir: Annotated[str | None, "folder of the result; null: runs/<name of the YAML file>"] = None
    overwrite: Annotated[bool, "replace what is in the folder"] = False
    resume: Annotated[
        bool | str, "go on from the newest checkpoint, or from this one; auto: if there is one"
    ] = False
    push: Annotated[str | None, "owner/name on the Hub, to which the result is uploaded"] = None
    private: Annotated[bool, "a repository that push makes is private"] = True


SECTIONS: dict[str, type] = {
    "model": ModelSettings,
    "lora": LoraConfig,
    "data": DataSettings,
    "train": TrainSettings,
    "eval": EvalSettings,
    "output": OutputSettings,
}
# how rows are read: `evaluate` and `preview` have these too
READING = tuple(f"data.{name}" for name in READING_NAMES)
# what `evaluate` has beside them
EVALUATING = (
    *("data.max_target_length", "data.doc_stride", "data.problem_type"),
    *(f"eval.{name}" for name in ("metrics", "temperature", "top_p", "top_k", "seed")),
)
# settings that stand at the top of a YAML file too
AT_THE_TOP = {"task": "train.task"}
# where a run's start differs from LoraConfig's defaults: adapters on all linear layers
LORA_DEFAULTS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# fields that the run fills in
LORA_OURS = (
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "task_type",
)
LORA_SHOWN = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
# short flags, and the names that other tools use: these last are only suggested
SHORT = {
    "model": "model.path",
    "data": "data.train",
    "eval": "data.eval",
    "lr": "train.learning_rate",
    "batch_size": "train.batch_size",
    "output": "output.dir",
    "seed": "train.seed",
}
ELSEWHERE = {
    "alpha": "lora.lora_alpha",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "dropout": "lora.lora_dropout",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "lr_scheduler": "train.lr_scheduler_type",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "output_dir": "output.dir",
    "hub_model_id": "output.push",
    "push_to_hub": "output.push",
    "optim": "train.optimizer",
    "load_in_4bit": "model.quantize: nf4",
    "load_in_8bit": "model.quantize: int8",
    "quantization": "model.quantize",
    "bnb_4bit_quant_type": "model.quantize",
    "bnb_4bit_use_double_quant": "model.double_quant",
    "bnb_4bit_compute_dtype": "model.dtype",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
}


class Setting(NamedTuple):
    type: Any
    default: Any
    help: str


@dataclass(frozen=True)
class RunSettings:
    """The sections, checked, and for each dotted name where its value came from."""

    model: ModelSettings
    lora: dict[str, Any]  # keywords of LoraConfig
    data: DataSettings
    train: TrainSettings
    eval: EvalSettings
    output: OutputSettings
    origin: dict[str, str]

    def listing(self) -> list[tuple[str, Any, str]]:
        """(dotted name, value, origin), of every setting, in the sections' order."""
        return [(name, self[name], self.origin[name]) for name in self.origin]

    def __getitem__(self, name: str) -> Any:
        section, leaf = name.split(".", 1)
        values = getattr(self, section)
        return values[leaf] if isinstance(values, dict) else getattr(values, leaf)


def known_settings() -> dict[str, Setting]:
    """Every dotted name with its type, default and help."""
    known = {}
    for section, cls in SECTIONS.items():
        hints = get_type_hints(cls, include_extras=True)
        for f in dataclasses.fields(cls):
            if section == "lora" and f.name in LORA_OURS:
                continue
            default = f.default
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            if section == "lora":
                default = LORA_DEFAULTS.get(f.name, default)
            texts = [text for text in get_args(hints[f.name])[1:] if isinstance(text, str)]
            help = texts[0] if get_origin(hints[f.name]) is Annotated and texts else ""
            known[f"{section}.{f.name}"] = Setting(hints[f.name], default, help)
    return known


def add_flags(parser: argparse.ArgumentParser, sections: tuple[str, ...] = tuple(SECTIONS)) -> None:
    """A flag for every setting: `--train.learning_rate`, and `--learning_rate` where that is clear.

    Only the flags that are given appear in the namespace, under their dotted names.
    """
    known = known_settings()
    short = short_names(known)
    groups = {name: parser.add_argument_group(name) for name in sections}
    for name, setting in known.items():
        section, leaf = name.split(".", 1)
        if section not in groups:
            continue
        hidden = section == "lora" and leaf not in LORA_SHOWN
        spellings = [f"--{word}" for word, full in short.items() if full == name]
        groups[section].add_argument(
            f"--{name}",
            *spellings,
            dest=name,
            default=argparse.SUPPRESS,
            metavar="X",
            help=argparse.SUPPRESS if hidden else _help(setting),
            **_arity(setting.type),
        )
        dashed = {f.replace("_", "-") for f in (f"--{name}", *spellings)}
        dashed -= {f"--{name}", *spellings}
        if dashed:
            groups[section].add_argument(
                *sorted(dashed),
                dest=name,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
                **_arity(setting.type),
            )
    if "lora" in groups:
        groups["lora"].description = "and every other field of LoraConfig, as --lora.FIELD"


def add_flags_of(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    """Flags of single settings for another command: `--columns` for data.columns."""
    known = known_settings()
    for name in names:
        leaf = name.split(".", 1)[1]
        parser.add_argument(
            *dict.fromkeys((f"--{leaf}", f"--{leaf.replace('_', '-')}")),
            dest=name,
            default=argparse.SUPPRESS,
            metavar="X",
            help=_help(known[name]),
            **_arity(known[name].type),
        )


def given_flags(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """{leaf: value} of those of `names` that were given. Raises SettingsError."""
    known, found, problems = known_settings(), {}, []
    for name in names:
        if not hasattr(args, name):
            continue
        try:
            value = check_value(FlagValue(getattr(args, name)), known[name].type)
            found[name.split(".", 1)[1]] = value
        except Wrong as wrong:
            problems.append(f"--{name.split('.', 1)[1]} {wrong}")
    if problems:
        raise SettingsError(listed(problems))
    return found


def short_names(known: Mapping[str, Setting]) -> dict[str, str]:
    """Leaf names that only one section has, and the short forms."""
    leaves: dict[str, list[str]] = {}
    for name in known:
        leaves.setdefault(name.split(".", 1)[1], []).append(name)
    clear = {leaf: names[0] for leaf, names in leaves.items() if len(names) == 1}
    taken = {word: full for word, full in clear.items() if word not in SECTIONS}
    return {**taken, **SHORT}


def resolve(
    config: Path | None, flags: Mapping[str, Any], required: tuple[str, ...]
) -> RunSettings:
    """Defaults, then the YAML file, then `flags` (dotted names); all problems in one SettingsError."""
    known = known_settings()
    values = {name: setting.default for name, setting in known.items()}
    origin = dict.fromkeys(known, "default")
    problems: list[str] = []
    given = [*(_from_file(config, known, problems) if config else []), *_from_flags(flags)]
    for name, value, where in given:
        try:
            values[name], origin[name] = check_value(value, known[name].type), where
        except Wrong as wrong:
            problems.append(f"{where}: {name} {wrong}")
    broken = [name for name, _, _ in given if values[name] is None]
    for name in required:
        if values[name] is None and name not in broken:
            problems.append(f"{name} is missing: {known[name].help}. Give it as --{name} X.")
    problems += _lora_problems(values)
    given_names = [name for name in origin if origin[name] != "default"]
    if values["train.task"] in TASKS:
        problems += meaningless(given_names, TASKS[values["train.task"]])
    settings = None if problems else _gathered(values, origin)
    problems += misplaced(settings.train) if settings else []
    if problems or settings is None:
        raise SettingsError(listed(problems))
    return settings


def meaningless(given: Iterable[str], task: Task) -> list[str]:
    """What is wrong with settings that were given and of which the task makes nothing."""
    return [
        f"{name} has no meaning for task {task.name}: leave it out."
        for name in given
        if name in task.unused
    ]


def _gathered(values: Mapping[str, Any], origin: dict[str, str]) -> RunSettings:
    by_section: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in values.items():
        section, leaf = name.split(".", 1)
        by_section[section][leaf] = value
    made = {s: cls(**by_section[s]) for s, cls in SECTIONS.items() if s != "lora"}
    lora = {**by_section["lora"], "task_type": TASKS[made["train"].task].task_type}
    return RunSettings(**made, lora=lora, origin=origin)


def _from_file(path: Path, known: Mapping[str, Setting], problems: list[str]) -> list[tuple]:
    """(name, value, "file:line") of a YAML file; what is unknown goes to `problems`."""
    given: list[tuple] = []
    unknown = set()
    try:
        entries = read_yaml(path)
    except Wrong as wrong:
        raise SettingsError(str(wrong)) from None
    for section, leaf, value, where in entries:
        if leaf is None and section in AT_THE_TOP:
            given.append((AT_THE_TOP[section], value, where))
        elif section not in SECTIONS:
            if section in unknown:
                continue  # once, not for each of its keys
            unknown.add(section)
            hint = _suggestion(section, known) or did_you_mean(section, (*SECTIONS, *AT_THE_TOP))
            problems.append(f"{where}: unknown section {section!r}.{hint}")
        elif leaf is None:
            problems.append(f"{where}: section {section!r} should hold settings, found {value!r}.")
        elif f"{section}.{leaf}" not in known:
            problems.append(
                f"{where}: unknown key {section}.{leaf}.{_suggestion(leaf, known, section)}"
            )
        else:
            given.append((f"{section}.{leaf}", value, where))
    first = {name: where for name, _, where in reversed(given)}
    problems += [
        f"{where}: {name} was set at {first[name]}"
        for name, _, where in given
        if first[name] != where
    ]
    return given


def _suggestion(leaf: str, known: Mapping[str, Setting], section: str = "") -> str:
    if leaf in ELSEWHERE:
        return f" Did you mean {ELSEWHERE[leaf]!r}?"
    elsewhere = [name for name in known if name.split(".", 1)[1] == leaf]
    if elsewhere:
        return f" Did you mean {' or '.join(map(repr, elsewhere))}?"
    return did_you_mean(f"{section}.{leaf}", known) if section else ""


def _from_flags(flags: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    return [(name, FlagValue(value), f"--{name}") for name, value in flags.items()]


def _lora_problems(values: Mapping[str, Any]) -> list[str]:
    given = {name.split(".", 1)[1]: v for name, v in values.items() if name.startswith("lora.")}
    try:
        LoraConfig(**given)
    except LowrankError as error:
        return [f"section lora: {error}"]
    return []


def _help(setting: Setting) -> str:
    default = "null" if setting.default is None else setting.default
    return f"{setting.help or 'as in LoraConfig'} ({default})".replace("%", "%%")


def _arity(annotation: Any) -> dict[str, Any]:
    """Flags of lists take several words; those of yes and no may stand alone."""
    kinds = _alternatives(annotation)
    if bool in kinds:
        return {"nargs": "?", "const": "true"}
    if any(get_origin(kind) is list for kind in kinds):
        return {"nargs": "+"}
    return {}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return (
        get_args(annotation)
        if get_origin(annotation) not in (None, list, dict, Literal)
        else (annotation,)
    )
