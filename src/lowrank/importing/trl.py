"""Configurations of TRL's scripts: `trl sft --config sft.yaml`, or the arguments as a file."""

from typing import Any

from lowrank.importing.config import Config, Unmapped
from lowrank.importing.data import DataSet, Reading, data_name, together
from lowrank.importing.rules import (
    NOTHING,
    PLACE,
    SPEED,
    TELLING,
    Rule,
    alike,
    choice,
    no_effect,
    taken,
    to,
    unsupported,
    words,
)
from lowrank.importing.trainer import ARGUMENTS, reward_functions
from lowrank.importing.trainer import DEFAULTS as TRAINER_DEFAULTS

# keys that only one of TRL's scripts has, the most telling first
TELLS = {
    "grpo": (
        "num_generations",
        "reward_funcs",
        "max_completion_length",
        "epsilon",
        "reward_weights",
    ),
    "kto": ("desirable_weight", "undesirable_weight"),
    "reward": ("center_rewards_coefficient",),
    "sft": ("packing", "dataset_text_field", "assistant_only_loss", "completion_only_loss"),
    "dpo": ("beta", "loss_type", "precompute_ref_log_probs", "max_prompt_length", "ld_alpha"),
}
# what TRL takes of settings that lowrank leaves to it; with another value they change the result
AS_IN_TRL: dict[str, Any] = {
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "num_iterations": 1,
    "epsilon": 0.2,
    "sapo_temperature_neg": 1.05,
    "sapo_temperature_pos": 1.0,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "importance_sampling_level": "token",
    "multi_objective_aggregation": "sum_then_normalize",
    "scale_rewards": "group",
    "top_entropy_quantile": 1.0,
    "entropy_coef_max": 1.0,
    "entropy_coef_delta": 0.005,
    "entropy_target": 0.2,
    "use_bias_correction_kl": True,
    **dict.fromkeys(
        (
            *("loss_weights", "ld_alpha", "use_weighting", "sync_ref_model", "min_p", "delta"),
            *("epsilon_high", "mask_truncated_completions", "entropy_coef", "entropy_coef_min"),
            *("use_adaptive_entropy", "off_policy_mask_threshold", "generation_kwargs"),
            *("chat_template_kwargs", "center_rewards_coefficient", "generation_batch_size"),
            *("steps_per_generation", "max_tool_calling_iterations", "reward_model_name_or_path"),
        )
    ),
}
RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "grpo": 1e-6, "reward": 1e-4}
BY_ARCHITECTURE = "what PEFT adapts in such a model"
ENTRY = ("path", "name", "data_files", "split", "columns", "data_dir")


def task_of(config: Config) -> str:
    """Which of TRL's scripts the file is for: its keys tell, where nobody says it."""
    if config.task:
        return config.task
    if config.written.get("lora_task_type") == "SEQ_CLS":
        return "reward"
    for task, tells in TELLS.items():
        found = [key for key in tells if key in config.written]
        if found:
            config.remark(f"taken for `trl {task}`, by {', '.join(found)}; --task says otherwise")
            return task
    config.remark("taken for `trl sft`, for no key tells another; --task says otherwise")
    return "sft"


def method(value: Any, config: Config) -> dict[str, Any]:
    return {"train.method": "lora" if value else "full"}


def targets(value: Any, config: Config) -> dict[str, Any]:
    if value == BY_ARCHITECTURE:
        return {"lora.target_modules": None}
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    return {"lora.target_modules": one if isinstance(one, str) else list(value)}


def four_bits(value: Any, config: Config) -> dict[str, Any]:
    return {"model.quantize": config["bnb_4bit_quant_type"] or "nf4"} if value else {}


def eight_bits(value: Any, config: Config) -> dict[str, Any]:
    return {"model.quantize": "int8"} if value else {}


def data_set(value: Any, config: Config) -> dict[str, Any]:
    if config["datasets"]:
        raise Unmapped("datasets is in force", matters=False)
    part, split = config["dataset_config"], config["dataset_train_split"]
    found = {"data.train": data_name(value, part, split), **_reading(config).settings()}
    if (config["eval_strategy"] or "no") != "no":
        found["data.eval"] = data_name(value, part, config["dataset_test_split"] or "test")
    return found


def mixture(value: Any, config: Config) -> dict[str, Any]:
    sets = []
    for i, entry in enumerate(value):
        for key, held in entry.items():
            if key not in ENTRY and held is not None:
                config.miss(("datasets", i, key), held, "a share of a mixture; rows are taken all")
        files = entry.get("data_files")
        if isinstance(files, dict):
            files = files.get(entry.get("split", "train"), [])
        names = [files] if isinstance(files, str) else list(files or ())
        names = names or [data_name(entry["path"], entry.get("name"), entry.get("split"))]
        sets.append(DataSet(names, _reading(config), ("datasets", i)))
    return together(sets, config, lambda other: other.names)


def _reading(config: Config) -> Reading:
    column = config["dataset_text_field"] or "text"
    columns = {} if column == "text" else {column: "text"}
    if config["assistant_only_loss"]:
        return Reading(columns=columns, loss_on="assistant")
    if config["completion_only_loss"] is False:
        return Reading(columns=columns, loss_on="all")
    if config.defaults.get("task") == "sft" and config["completion_only_loss"] is None:
        config.remark(
            "of rows with `messages` TRL learns every token unless assistant_only_loss is set, lowrank the "
            "last answer: data.loss_on says which"
        )
    return Reading(columns=columns)


def loss_type(value: Any, config: Config) -> dict[str, Any]:
    names = words(value)
    if config.defaults["task"] == "sft":
        raise Unmapped("the loss is that of the likeliest token (nll)", names != ["nll"])
    if len(names) > 1:
        raise Unmapped("several losses together")
    return {"train.loss_type": names[0]}


def dropout(value: Any, config: Config) -> dict[str, Any]:
    if value and config["disable_dropout"]:
        config.remark(f"TRL switches dropout off for {config.defaults['task']} (disable_dropout)")
        return {"lora.lora_dropout": 0.0}
    return {"lora.lora_dropout": value}


def length(value: Any, config: Config) -> dict[str, Any]:
    return {"data.max_length": value}


def router_loss(value: Any, config: Config) -> dict[str, Any]:
    raise Unmapped("the router's loss is weighed as the model's configuration says", bool(value))


RULES: dict[str, Rule] = {
    **ARGUMENTS,
    "task": to("train.task"),
    "model_name_or_path": to("model.path"),
    "model_revision": to("model.revision"),
    "dtype": choice("model.dtype", {"auto": "auto", "bfloat16": "bfloat16", "float32": "float32"}),
    "torch_dtype": choice(
        "model.dtype", {"auto": "auto", "bfloat16": "bfloat16", "float32": "float32"}
    ),
    "use_peft": method,
    "lora_r": to("lora.r"),
    "lora_alpha": to("lora.lora_alpha"),
    "lora_dropout": dropout,
    "lora_target_modules": targets,
    "lora_target_parameters": to("lora.target_parameters"),
    "lora_modules_to_save": to("lora.modules_to_save"),
    "lora_task_type": no_effect("train.task says it"),
    "use_rslora": to("lora.use_rslora"),
    "use_dora": to("lora.use_dora"),
    "load_in_4bit": four_bits,
    "load_in_8bit": eight_bits,
    "bnb_4bit_quant_type": taken,
    "use_bnb_nested_quant": to("model.double_quant"),
    "bnb_4bit_quant_storage": SPEED,
    "bf16": no_effect("no autocast here: weights and products are in model.dtype"),
    "dataset_name": data_set,
    "datasets": mixture,
    "test_split_size": to("data.eval_split"),
    "max_length": length,
    "max_seq_length": length,
    "packing": to("train.packing"),
    "packing_strategy": unsupported("rows cut where a pack is full", ("bfd", "bfd_split", "ffd")),
    "eval_packing": no_effect("evaluation does not pack"),
    "padding_free": SPEED,
    "truncation_mode": unsupported("rows are cut at their end", ("keep_start",)),
    "assistant_only_loss": taken,
    "completion_only_loss": taken,
    **alike(taken, "dataset_text_field", "dataset_config", "dataset_train_split"),
    "dataset_test_split": taken,
    "dataset_streaming": unsupported("streaming; rows are read before training starts"),
    "streaming": unsupported("streaming; rows are read before training starts"),
    "dataset_kwargs": unsupported("options of datasets"),
    "shuffle_dataset": no_effect("rows are shuffled by train.seed"),
    "chat_template_path": unsupported(
        "a chat template of another model; put it into the tokenizer"
    ),
    "eos_token": unsupported("another end token; set it in the tokenizer"),
    "pad_token": no_effect("padding is never learnt, whichever token it is"),
    "model_init_kwargs": unsupported("options of from_pretrained"),
    "router_aux_loss_coef": router_loss,
    "loss_type": loss_type,
    "beta": to("train.beta"),
    "label_smoothing": to("train.label_smoothing"),
    "desirable_weight": to("train.desirable_weight"),
    "undesirable_weight": to("train.undesirable_weight"),
    "num_generations": to("train.num_generations"),
    "max_completion_length": to("train.max_completion_length"),
    "temperature": to("train.temperature"),
    "reward_funcs": reward_functions,
    "reward_weights": to("train.reward_weights"),
    "max_prompt_length": unsupported("a limit of prompts alone; data.max_length is of both"),
    "disable_dropout": taken,
    "trust_remote_code": no_effect("no code out of repositories is run"),
    "precompute_ref_log_probs": SPEED,
    "precompute_ref_batch_size": SPEED,
    "ignore_bias_buffers": PLACE,
    **alike(SPEED, "attn_implementation", "attn_impl", "use_vllm", "vllm_mode"),
    **alike(SPEED, "vllm_gpu_memory_utilization", "vllm_server_host", "vllm_server_port"),
    **alike(SPEED, "cast_lm_head_to_fp32", "ds3_gather_for_generation", "cache_implementation"),
    **alike(SPEED, "use_transformers_paged", "use_transformers_continuous_batching"),
    **alike(SPEED, "transformers_continuous_batching_config", "vllm_model_impl"),
    **alike(SPEED, "vllm_enable_sleep_mode", "vllm_structured_outputs_regex"),
    **alike(SPEED, "vllm_server_base_url", "vllm_server_timeout", "vllm_group_port"),
    **alike(SPEED, "vllm_max_model_length", "vllm_tensor_parallel_size"),
    **alike(SPEED, "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    **alike(SPEED, "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
    **alike(SPEED, "vllm_importance_sampling_cap"),
    **alike(TELLING, "log_completions", "num_completions_to_print", "log_multimodal"),
    **alike(TELLING, "log_unique_prompts", "log_completions_hub_repo"),
    "num_generations_eval": no_effect("evaluation answers greedily"),
    **{
        key: unsupported("lowrank leaves it as TRL has it", (*NOTHING, value))
        for key, value in AS_IN_TRL.items()
    },
}
MARKS = ("dataset_name", "use_peft", "lora_target_modules", "lora_r", "attn_implementation")


def defaults(config: Config) -> dict[str, Any]:
    task = task_of(config)
    return {
        **TRAINER_DEFAULTS,
        "task": task,
        "learning_rate": RATES.get(task, 2e-5),
        "use_peft": False,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "disable_dropout": task in ("dpo", "kto", "reward"),
        "lora_target_modules": BY_ARCHITECTURE,
        "gradient_checkpointing": True,
        "max_length": 1024,
    }
