"""A training run from settings: read, load, measure, adapt, train, save, measure again."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lowrank
from lowrank import LoraConfig
from lowrank.bases.kinds import count_parameters
from lowrank.cli.opening import (
    context_length,
    held_out,
    model_path,
    open_base,
    open_read,
    open_tokenizer,
)
from lowrank.cli.quantising import wanted
from lowrank.cli.settings import RunSettings, SettingsError
from lowrank.model_folder import load_config
from lowrank.model_size import held_bytes
from lowrank.quantisation import Quantisation
from lowrank.report.data import ModuleRow
from lowrank.targets import saved_modules
from lowrank.train.data.encode import Encoded, encode, pad_id
from lowrank.train.data.rows import DataError, ReadData, rows_of, supervised
from lowrank.train.evaluate import Evaluation, mean_loss
from lowrank.train.run import processes
from lowrank.train.run.best import check_best
from lowrank.train.run.saving import save
from lowrank.train.run.screen import Screen
from lowrank.train.run.trainer import Training, count_trainable
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.table import TASKS

# what a run writes: --overwrite removes these, and nothing else that is in the folder
WRITTEN = (
    "checkpoint-*",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model*.safetensors",
    "log.jsonl",
    "run.json",
    "loss.png",
    "reports",
    *("tensorboard", "wandb", "mlflow.db", "trackio"),
)


class Data(NamedTuple):
    """Everything that is read before any weight is."""

    tokenizer: Any
    train: Encoded
    eval: Encoded | None
    skill: Encoded | None  # text on which the base's own skill is measured
    found: ReadData  # how the training rows were read


class Result(NamedTuple):
    targets: list[Any]  # lowrank.Target; empty for full fine-tuning
    heads: list[ModuleRow]  # what the adapter holds whole
    training: Training
    before: Evaluation | None
    after: Evaluation | None
    skill_before: float | None
    skill_after: float | None
    quantisation: Quantisation | None  # of the base
    base_bytes: int  # its weights, as they were held


def open_data(settings: RunSettings) -> Data:
    """Tokenizer and rows; bad rows end the run before a weight is read."""
    data, path = settings.data, model_path(settings.model.path or "")
    task = TASKS[settings.train.task]
    check_skill(settings)
    check_best(settings.train, bool(data.eval or data.eval_split))
    tokenizer = open_tokenizer(path, settings.model.revision)
    length = context_length(load_config(path, settings.model.revision), data.max_length)
    found, eval_found, skill_found = _all_read(
        (data.train or [], "train", {**data.reading, "takes": task.takes}),
        (data.eval or [], "test", {**data.reading, "takes": task.takes}),
        (data.base_skill or [], "test", {}),
    )
    rows, eval_rows = (rows_of(task, read) for read in (found, eval_found))
    skill = supervised(skill_found)
    if data.eval is None and data.eval_split is not None:
        rows, eval_rows = held_out(rows, data.eval_split, settings.train.seed)
    train = task.prepare(rows[: data.limit], tokenizer, settings, max_length=length)
    return Data(
        tokenizer,
        train,
        task.prepare(eval_rows, tokenizer, settings, max_length=length, like=train.model_options)
        if eval_rows
        else None,
        encode(skill, tokenizer, max_length=length, chat_template=data.chat_template)
        if skill
        else None,
        found,
    )


def check_skill(settings: RunSettings) -> None:
    """data.base_skill is the loss of a causal language model on text."""
    task = TASKS[settings.train.task]
    if settings.data.base_skill and task.task_type != "CAUSAL_LM":
        raise SettingsError(
            f"data.base_skill is measured on what a model says, and train.task {task.name} trains "
            "one that says nothing. Leave it out."
        )


def _all_read(*wanted: tuple[list[str] | str, str, dict[str, Any]]) -> list[ReadData]:
    """Each (names, split, options) read; what is wrong with any of them comes in one DataError."""
    found, problems = [], []
    for names, split, options in wanted:
        try:
            found.append(open_read(names, split, **options))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return found


def train(settings: RunSettings, data: Data, folder: Path, checkpoint: Path | None) -> Result:
    """Load, measure, adapt, train, save, measure again."""
    quantisation, task = wanted(settings), TASKS[settings.train.task]
    path = model_path(settings.model.path or "")
    model: Any = open_base(
        path,
        dtype=settings.model.dtype,
        device=settings.model.device,
        revision=settings.model.revision,
        quantisation=quantisation,
        task_type=task.task_type,
        saved=settings.lora["modules_to_save"] or (),
        **data.train.model_options,
    )
    base_bytes = held_bytes(model)
    before, skill_before = measure(model, settings, data)
    check_best(settings.train, before is not None, before.scores if before else None)
    torch.manual_seed(settings.train.seed)  # the adapter's start
    targets: list[Any] = []
    heads: list[ModuleRow] = []
    if settings.train.method == "lora":
        config = LoraConfig(**settings.lora)
        targets = lowrank.plan(model, config)
        heads = head_rows(model, config)
        model = lowrank.get_peft_model(model, config)
        model.run_settings = {
            **saved_with_adapter(settings),
            "model_options": data.train.model_options,
        }
    trainable, total = count_trainable(model), count_parameters(model)[1]
    print(f" {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})\n")
    if processes.first():
        clear(folder, keep_checkpoints=checkpoint is not None)
    processes.wait()
    options = {"resume_from": checkpoint, "callbacks": [Screen()]}
    options |= _measured(model, settings, data)
    training = task.train(
        Given(model, data.tokenizer, data.train, data.eval, folder, settings, options)
    )
    save(model, folder)
    if settings.train.method == "full" and processes.first():
        data.tokenizer.save_pretrained(folder)
    after, skill_after = measure(model, settings, data)
    return Result(
        targets, heads, training, before, after, skill_before, skill_after, quantisation, base_bytes
    )


def _measured(model: Any, settings: RunSettings, data: Data) -> dict[str, Any]:
    """`measure` for trainer.fit, where the task's scores are wanted while it trains."""
    wanted = settings.train.metric_for_best_model not in (None, "loss")
    if data.eval is None or not (wanted or settings.eval.during_training):
        return {}
    task = TASKS[settings.train.task]
    return {"measure": lambda: task.evaluate(model, data.tokenizer, data.eval, settings).scores}


def head_rows(model: Any, config: LoraConfig) -> list[ModuleRow]:
    """The modules that are trained and saved whole."""
    rows = []
    for path in saved_modules(model, config):
        module = model.get_submodule(path)
        weight = getattr(module, "weight", None)
        shape = "" if weight is None else " × ".join(map(str, weight.shape))
        kind, size = "saved whole", count_parameters(module)[1]
        rows.append(ModuleRow(path.rpartition(".")[2], kind, shape, None, 1, size))
    return rows


def saved_with_adapter(settings: RunSettings) -> dict[str, Any]:
    """How it was trained, for the adapter's metadata; without names of files, which may be private."""
    private = ("model.", "output.", "lora.", "data.train", "data.eval", "data.base_skill")
    return {name: value for name, value, _ in settings.listing() if not name.startswith(private)}


def measure(
    model: Any, settings: RunSettings, data: Data
) -> tuple[Evaluation | None, float | None]:
    """On the evaluation rows, and the loss on the base's own skill."""
    found = skill = None
    if data.eval:
        found = TASKS[settings.train.task].evaluate(model, data.tokenizer, data.eval, settings)
    if data.skill:
        pad = pad_id(data.tokenizer)
        skill, _ = mean_loss(model, data.skill.examples, pad, settings.eval.batch_size)
    return found, skill


def clear(folder: Path, keep_checkpoints: bool) -> None:
    """Remove what an earlier run wrote, and nothing else, so that no stale checkpoint is picked up."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in WRITTEN if not keep_checkpoints else ("run.json", "reports"):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
