"""mlx-lm's lora_config.yaml."""

import json
from pathlib import Path
from typing import Any

from lowrank.importing.config import Config, Unmapped
from lowrank.importing.data import Reading, data_name
from lowrank.importing.rules import (
    EVALUATION,
    SPEED,
    TELLING,
    Rule,
    alike,
    choice,
    no_effect,
    taken,
    to,
    unsupported,
)
from lowrank.importing.trainer import NEVER

SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}
LORA = ("rank", "scale", "dropout", "keys", "alpha")
HF_DATASET = ("path", "name", "train_split", "valid_split", "test_split", "config")
FEATURES = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "chat_feature": "messages",
    "text_feature": "text",
}


def last_layers(value: Any, config: Config) -> dict[str, Any]:
    """The last `value` blocks; all of them where it is below 1 … as far as the model's config.json is at hand."""
    if value < 0:
        return {}
    if value == 0:
        raise Unmapped("no layer is adapted")
    name = config.model or config["model"]
    count = _layers(name)
    if count is None:
        raise Unmapped(
            f"the last {value} layers: how many {name} has is not known here, its config.json is not at hand. "
            "Give lora.layers_to_transform, or the base with --model"
        )
    return {"lora.layers_to_transform": list(range(max(count - value, 0), count))}


def _layers(name: str) -> int | None:
    """How many blocks the model has, by its config.json in a folder or in the hub's cache."""
    if name == "embedded":
        from lowrank.embedded import model_path

        name = str(model_path())
    path = Path(name) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(name, "config.json")
        except ValueError:  # no name that the hub could have
            return None
        if not isinstance(found, str):
            return None
        path = Path(found)
    about = json.loads(path.read_text(encoding="utf-8"))
    about = about.get("text_config", about)
    return next((about[key] for key in ("num_hidden_layers", "n_layer") if key in about), None)


def lora(value: Any, config: Config) -> dict[str, Any]:
    """mlx-lm scales B·A by `scale` itself: lora_alpha / r in PEFT's terms."""
    for key in value:
        if key not in LORA:
            config.miss(("lora_parameters", key), value[key], "not a key of mlx-lm's that is known")
    r = value.get("rank", 8)
    found = {
        "lora.r": r,
        "lora.lora_alpha": value.get("scale", 20.0) * r,
        "lora.lora_dropout": value.get("dropout", 0.0),
        "lora.target_modules": value.get("keys") or "all-linear",
    }
    if "alpha" in value:
        config.miss(("lora_parameters", "alpha"), value["alpha"], "mlx-lm reads scale alone", False)
    return found


def iterations(value: Any, config: Config) -> dict[str, Any]:
    """mlx-lm counts batches; a step here is an update, after grad_accumulation_steps of them."""
    return {"train.max_steps": max(value // _accumulated(config), 1)}


def batches(name: str) -> Rule:
    """A number of batches, as a number of updates."""
    return lambda value, config: {name: max(value // _accumulated(config), 1)}


def _accumulated(config: Config) -> int:
    return config["grad_accumulation_steps"] or config["gradient_accumulation_steps"] or 1


def optimizer(value: Any, config: Config) -> dict[str, Any]:
    name = str(value).lower()
    given = (config["optimizer_config"] or {}).get(name) or {}
    decay = given.get("weight_decay", {"adamw": 0.01}.get(name, 0.0))
    for key, held in given.items():
        if key not in ("weight_decay", "bias_correction"):
            config.miss(("optimizer_config", name, key), held, "as here: β 0.9, 0.999, ε 1e-8")
    if name not in ("adam", "adamw"):
        return {**choice("train.optimizer", {"adafactor": "adafactor"})(name, config)}
    if not given.get("bias_correction"):
        config.remark(
            "optimizer: Adam's bias correction is on here; in mlx-lm it is off by default"
        )
    return {"train.optimizer": "adamw", "train.weight_decay": decay}


def schedule(value: Any, config: Config) -> dict[str, Any]:
    name, arguments = value.get("name"), value.get("arguments", [])
    if name not in SCHEDULES:
        raise Unmapped(f"the schedule {name!r}; here: {', '.join(SCHEDULES)}, or none")
    rate, *rest = arguments
    end = (rest[1:] or [0.0])[0] if name == "cosine_decay" else (rest or [0.0])[0]
    if float(end):
        config.miss(
            ("lr_schedule", "arguments"), arguments, "the rate falls to 0 here, not to its end"
        )
    if value.get("warmup_init"):
        config.miss(
            ("lr_schedule", "warmup_init"), value["warmup_init"], "the rate rises from 0 here"
        )
    updates = iterations(config["iters"], config)["train.max_steps"]
    if name == "cosine_decay" and rest and rest[0] != updates:
        why = f"the rate falls over all {updates} updates here, not over {rest[0]}"
        config.miss(("lr_schedule", "arguments"), arguments, why)
    return {
        "train.lr_scheduler_type": SCHEDULES[name],
        "train.learning_rate": float(rate),
        "train.warmup_steps": value.get("warmup", 0),
    }


def rate(value: Any, config: Config) -> dict[str, Any]:
    if config["lr_schedule"]:
        raise Unmapped("the schedule's own rate is in force", matters=False)
    return {
        "train.learning_rate": float(value),
        "train.lr_scheduler_type": "constant",
        "train.warmup_steps": 0,
    }


def folder(value: Any, config: Config) -> dict[str, Any]:
    """A folder with train, valid and test.jsonl, or a name on the hub with these splits."""
    if config["hf_dataset"]:
        raise Unmapped("hf_dataset is in force", matters=False)
    path = str(value).rstrip("/")
    columns = {config[key]: ours for key, ours in FEATURES.items() if config[key]}
    reading = Reading(columns=columns, loss_on=_loss_on(config)).settings()
    if data_name(path, split="valid") != path:
        return {"data.train": path, "data.eval": f"{path}@valid", **reading}
    return {"data.train": f"{path}/train.jsonl", "data.eval": f"{path}/valid.jsonl", **reading}


def on_hub(value: Any, config: Config) -> dict[str, Any]:
    if isinstance(value, list) and len(value) > 1:
        raise Unmapped("several data sets with columns of their own; write them in one shape")
    about = value[0] if isinstance(value, list) else value
    columns = {about[key]: ours for key, ours in FEATURES.items() if key in about}
    for key, held in about.items():
        if key not in (*HF_DATASET, *FEATURES):
            config.miss(("hf_dataset", key), held, "not a key of mlx-lm's that is known")
    path = about.get("path") or about.get("name")
    part = (about.get("config") or {}).get("name")
    return {
        "data.train": data_name(path, part, about.get("train_split", "train[:80%]")),
        "data.eval": data_name(path, part, about.get("valid_split", "train[-10%:]")),
        **Reading(columns=columns, loss_on=_loss_on(config)).settings(),
    }


def _loss_on(config: Config) -> str:
    return "completion" if config["mask_prompt"] else "all"


def method(value: Any, config: Config) -> dict[str, Any]:
    if value == "dora":
        return {"train.method": "lora", "lora.use_dora": True}
    return dict(choice("train.method", {"lora": "lora", "full": "full"})(value, config))


RULES: dict[str, Rule] = {
    "model": to("model.path"),
    "fine_tune_type": method,
    "num_layers": last_layers,
    "lora_layers": last_layers,
    "lora_parameters": lora,
    "data": folder,
    "hf_dataset": on_hub,
    **alike(taken, *FEATURES),
    "mask_prompt": taken,
    "max_seq_length": to("data.max_length"),
    "batch_size": to("train.batch_size"),
    "grad_accumulation_steps": to("train.gradient_accumulation_steps"),
    "gradient_accumulation_steps": to("train.gradient_accumulation_steps"),
    "iters": iterations,
    "learning_rate": rate,
    "lr_schedule": schedule,
    "optimizer": optimizer,
    "optimizer_config": taken,
    "steps_per_report": batches("train.logging_steps"),
    "steps_per_eval": batches("train.eval_steps"),
    "save_every": batches("train.save_steps"),
    "grad_checkpoint": to("train.gradient_checkpointing"),
    "seed": to("train.seed"),
    "adapter_path": to("output.dir"),
    "resume_adapter_file": unsupported("training an adapter of MLX's on; see lowrank convert"),
    "train": no_effect("the command says it: lowrank train"),
    "train_mode": choice("train.task", {"sft": "sft", "dpo": "dpo", "grpo": "grpo"}),
    "training_mode": choice("train.task", {"normal": "sft", "dpo": "dpo"}),
    "config": no_effect("the name of this file"),
    "max_grad_norm": lambda value, config: {"train.max_grad_norm": value},
    **alike(EVALUATION, "test", "test_batches", "val_batches"),
    **alike(TELLING, "wandb", "report_to", "project_name"),
    **alike(SPEED, "clear_cache_threshold"),
}
DEFAULTS: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 16,
    "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
    "data": "data",
    "batch_size": 4,
    "iters": 1000,
    "learning_rate": 1e-5,
    "optimizer": "adam",
    "max_grad_norm": float(NEVER),  # mlx-lm does not clip
    "steps_per_eval": 200,
    "save_every": 100,
    "seed": 0,
    "adapter_path": "adapters",
}
MARKS = (
    "iters",
    "lora_parameters",
    "fine_tune_type",
    "num_layers",
    "steps_per_eval",
    "adapter_path",
)
