"""Keys of transformers' TrainingArguments, which LLaMA-Factory and TRL share, and Axolotl partly."""

from typing import Any

from lowrank.importing.config import Config, Unmapped
from lowrank.importing.rules import (
    CACHE,
    EVALUATION,
    PLACE,
    SPEED,
    TELLING,
    Rule,
    alike,
    choice,
    no_effect,
    to,
    unsupported,
    words,
)
from lowrank.train.run.trackers import TRACKERS

OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw": "adamw",
    "adafactor": "adafactor",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw",
    "paged_adamw_32bit": "paged_adamw",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion": "lion",
    "lion_32bit": "lion",
    "lion_8bit": "lion_8bit",
    "paged_lion_8bit": "paged_lion_8bit",
}
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant_with_warmup": "constant"}
NEVER = 1_000_000_000  # a step that no run reaches, and a norm that no gradient has


def scheduler(value: Any, config: Config) -> dict[str, Any]:
    if value == "constant":  # transformers' has no warmup, whatever is set beside it
        return {"train.lr_scheduler_type": "constant", "train.warmup_steps": 0}
    return dict(choice("train.lr_scheduler_type", SCHEDULERS)(value, config))


def warmup_steps(value: Any, config: Config) -> dict[str, Any]:
    """Steps, or below 1 their share, as in transformers 5. Steps win over a ratio."""
    if not value or "constant" in (config["lr_scheduler_type"], config["lr_scheduler"]):
        return {}
    return {"train.warmup_ratio" if value < 1 else "train.warmup_steps": value}


def warmup_ratio(value: Any, config: Config) -> dict[str, Any]:
    if config["warmup_steps"] or "constant" in (
        config["lr_scheduler_type"],
        config["lr_scheduler"],
    ):
        raise Unmapped(f"not in force in {config.program} either", matters=False)
    return {"train.warmup_ratio": value}


def clipping(value: Any, config: Config) -> dict[str, Any]:
    return {"train.max_grad_norm": value or float(NEVER)}


def max_steps(value: Any, config: Config) -> dict[str, Any]:
    return {"train.max_steps": value} if value > 0 else {}


def every(name: str, strategy: str) -> Rule:
    """`eval_steps` and `save_steps`, which hold where the strategy is "steps"."""

    def rule(value: Any, config: Config) -> dict[str, Any]:
        chosen = config[strategy] or config[strategy.replace("eval", "evaluation")] or "steps"
        if chosen != "steps":
            raise Unmapped(f"{strategy} is {chosen}", matters=False)
        if value < 1:
            raise Unmapped("a share of the steps; here a number of steps", matters=False)
        return {name: int(value)}

    return rule


def strategy(name: str) -> Rule:
    """`eval_strategy`, `save_strategy`: by steps their number is mapped; each epoch is the default here."""

    def rule(value: Any, config: Config) -> dict[str, Any]:
        if value == "no":
            return {name: NEVER}
        if value not in ("steps", "epoch", True, False):
            raise Unmapped(f"{value!r}; here each epoch, or every so many steps", matters=False)
        return {}

    return rule


def repo(value: Any, config: Config) -> dict[str, Any]:
    return {"output.push": value} if config["push_to_hub"] in (True, None) else {}


def push(value: Any, config: Config) -> dict[str, Any]:
    if value and not config["hub_model_id"]:
        raise Unmapped("output.push wants the name: owner/name", matters=False)
    return {}


def resume(value: Any, config: Config) -> dict[str, Any]:
    if value in (False, "", "null"):
        return {}
    raise Unmapped("a checkpoint of another program; here a run goes on from its own with --resume")


def best_by(value: Any, config: Config) -> dict[str, Any]:
    name = str(value).removeprefix("eval_")
    if name != "loss":
        raise Unmapped(f"{value}; the task's own metrics are in docs/tasks.md", matters=False)
    return {"train.metric_for_best_model": name} if config["load_best_model_at_end"] else {}


def sampling(value: Any, config: Config) -> dict[str, Any]:
    if value == "sequential":  # TRL's way for KTO, whose batches compare neighbours
        raise Unmapped("rows in their order", matters=config["task"] != "kto")
    strategies = {"random": False, "group_by_length": True}
    return dict(choice("train.group_by_length", strategies)(value, config))


def trackers(value: Any, config: Config) -> dict[str, Any]:
    names = [name for name in words(value) if name != "none"]
    if not names:
        return {}
    if not set(names) <= set(TRACKERS):
        raise Unmapped(f"of {', '.join(names)}; here: {', '.join(TRACKERS)}", matters=False)
    return {"train.report_to": names}


def fsdp(value: Any, config: Config) -> dict[str, Any]:
    return {"train.fsdp": True} if value else {}


def deepspeed(value: Any, config: Config) -> dict[str, Any]:
    if not isinstance(value, str):
        raise Unmapped("DeepSpeed's options in the file itself; here the name of their file", False)
    return {"train.deepspeed": value} if value else {}


def reward_functions(value: Any, config: Config) -> dict[str, Any]:
    """`rewards.close` names a function in a file; here it is `rewards.py:close`."""
    found = []
    for name in words(value):
        module, _, function = name.rpartition(".")
        if not module:
            raise Unmapped(
                f"{name}: a function of {config.program}'s, or a model; name one of yours"
            )
        found.append(f"{module.replace('.', '/')}.py:{function}")
    return {"train.reward_functions": found}


ARGUMENTS: dict[str, Rule] = {
    "output_dir": to("output.dir"),
    "overwrite_output_dir": to("output.overwrite"),
    "learning_rate": to("train.learning_rate", float),
    "num_train_epochs": to("train.epochs"),
    "max_steps": max_steps,
    "per_device_train_batch_size": to("train.batch_size"),
    "per_device_eval_batch_size": to("eval.batch_size"),
    "gradient_accumulation_steps": to("train.gradient_accumulation_steps"),
    "lr_scheduler_type": scheduler,
    "warmup_steps": warmup_steps,
    "warmup_ratio": warmup_ratio,
    "optim": choice("train.optimizer", OPTIMIZERS),
    "weight_decay": to("train.weight_decay"),
    "max_grad_norm": clipping,
    "group_by_length": to("train.group_by_length"),
    "train_sampling_strategy": sampling,
    "gradient_checkpointing": to("train.gradient_checkpointing", bool),
    "activation_checkpointing": to("train.gradient_checkpointing", bool),
    "seed": to("train.seed"),
    "logging_steps": to("train.logging_steps"),
    "eval_steps": every("train.eval_steps", "eval_strategy"),
    "save_steps": every("train.save_steps", "save_strategy"),
    **alike(strategy("train.eval_steps"), "eval_strategy", "evaluation_strategy"),
    "save_strategy": strategy("train.save_steps"),
    "save_total_limit": to("train.save_total_limit"),
    "push_to_hub": push,
    "hub_model_id": repo,
    "hub_private_repo": to("output.private"),
    "resume_from_checkpoint": resume,
    "adam_beta1": unsupported("the optimiser's β₁ is 0.9 here", (0.9,)),
    "adam_beta2": unsupported("the optimiser's β₂ is 0.999 here", (0.999,)),
    "adam_epsilon": unsupported("the optimiser's ε is 1e-8 here", (1e-8,)),
    "fp16": unsupported("float16 is not trained in; model.dtype has float32 and bfloat16"),
    "neftune_noise_alpha": unsupported("noise on the embeddings (NEFTune)"),
    "label_smoothing_factor": unsupported("label smoothing"),
    "lr_scheduler_kwargs": unsupported("options of the schedule"),
    "optim_args": unsupported("options of the optimiser"),
    "optim_target_modules": unsupported("GaLore and its relatives"),
    "auto_find_batch_size": unsupported("a batch size that changes while it runs"),
    "dataloader_drop_last": unsupported("leaving out the rows of a last, smaller batch"),
    "average_tokens_across_devices": no_effect("the loss is a mean over tokens here"),
    "save_only_model": no_effect("checkpoints hold all that resuming takes"),
    "save_safetensors": no_effect("safetensors are written"),
    "remove_unused_columns": no_effect("columns that are not read are listed"),
    "do_train": no_effect("the command says it: lowrank train"),
    "do_eval": no_effect("there is an evaluation where data.eval or data.eval_split says so"),
    "do_predict": no_effect("the command says it: lowrank evaluate"),
    "data_seed": unsupported("a seed of its own for the order of rows; train.seed is of all", ()),
    **alike(CACHE, "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory"),
    **alike(CACHE, "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    "fsdp": fsdp,
    "deepspeed": deepspeed,
    "report_to": trackers,
    **alike(PLACE, "fsdp_config", "ddp_timeout", "ddp_backend", "local_rank"),
    **alike(PLACE, "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "accelerator_config"),
    **alike(PLACE, "use_cpu", "no_cuda", "ddp_broadcast_buffers"),
    **alike(SPEED, "tf32", "torch_compile", "torch_compile_backend", "use_liger_kernel"),
    **alike(SPEED, "gradient_checkpointing_kwargs", "torch_empty_cache_steps", "bf16_full_eval"),
    **alike(SPEED, "activation_offloading", "liger_kernel_config", "pad_to_multiple_of"),
    **alike(PLACE, "parallelism_config", "ddp_static_graph", "full_determinism"),
    **alike(SPEED, "activation_checkpointing_kwargs", "torch_compile_mode", "use_cache"),
    **alike(CACHE, "dataloader_multiprocessing_context", "dataloader_in_order", "label_names"),
    **alike(CACHE, "length_column_name", "ignore_data_skip", "enable_jit_checkpoint"),
    **alike(EVALUATION, "fp16_full_eval", "eval_do_concat_batches", "eval_use_gather_object"),
    **alike(EVALUATION, "include_for_metrics", "skip_memory_metrics"),
    **alike(TELLING, "log_level_replica", "trackio_bucket_id", "trackio_static_space_id"),
    **alike(TELLING, "save_on_each_node", "hub_revision", "debug"),
    **alike(TELLING, "restore_callback_states_from_checkpoint"),
    **alike(TELLING, "run_name", "logging_dir", "logging_strategy", "disable_tqdm"),
    **alike(TELLING, "logging_first_step", "log_level", "include_tokens_per_second", "project"),
    **alike(TELLING, "include_num_input_tokens_seen", "logging_nan_inf_filter", "trackio_space_id"),
    **alike(TELLING, "hub_strategy", "hub_token", "hub_always_push", "log_on_each_node"),
    "load_best_model_at_end": to("train.load_best_model_at_end"),
    "metric_for_best_model": best_by,
    "greater_is_better": no_effect("which way a metric is better is known here"),
    **alike(EVALUATION, "eval_on_start", "eval_accumulation_steps", "predict_with_generate"),
    **alike(EVALUATION, "prediction_loss_only", "eval_delay", "batch_eval_metrics"),
}
# what transformers takes where nothing is said, and lowrank takes otherwise
DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "group_by_length": False,
}
