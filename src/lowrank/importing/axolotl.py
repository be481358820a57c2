"""Axolotl's configurations, their data sets apart (axolotl_data.py)."""

from typing import Any

from lowrank.importing.axolotl_data import evaluation_sets, pretraining_sets, training_sets
from lowrank.importing.config import Config, Unmapped
from lowrank.importing.rules import (
    CACHE,
    EVALUATION,
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
)
from lowrank.importing.trainer import (
    ARGUMENTS,
    clipping,
    every,
    max_steps,
    repo,
    reward_functions,
    scheduler,
)

SHARED = (
    *("output_dir", "learning_rate", "gradient_accumulation_steps", "warmup_steps", "seed"),
    *("warmup_ratio", "weight_decay", "group_by_length", "gradient_checkpointing", "save_steps"),
    *("gradient_checkpointing_kwargs", "logging_steps", "eval_steps", "eval_strategy"),
    *("evaluation_strategy", "save_strategy", "save_total_limit", "resume_from_checkpoint"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "fp16", "neftune_noise_alpha", "optim_args"),
    *("lr_scheduler_kwargs", "optim_target_modules", "auto_find_batch_size", "save_only_model"),
    *("label_smoothing_factor", "save_safetensors", "remove_unused_columns", "deepspeed", "fsdp"),
    *("fsdp_config", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "local_rank"),
    *("ddp_find_unused_parameters", "tf32", "torch_compile", "torch_compile_backend"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "hub_strategy"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("accelerator_config", "include_tokens_per_second", "report_to"),
)
RL = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "grpo": "grpo"}
TEMPLATES = ("tokenizer_default",)


def adapter(value: Any, config: Config) -> dict[str, Any]:
    if value not in ("lora", "qlora"):
        raise Unmapped(f"the adapter {value!r}; here LoRA and QLoRA")
    if value == "qlora" and not config["load_in_4bit"] and not config["gptq"]:
        return {"train.method": "lora", "model.quantize": "nf4"}
    return {"train.method": "lora"}


def four_bits(value: Any, config: Config) -> dict[str, Any]:
    if not value:
        return {}
    given = config["bnb_config_kwargs"] or {}
    found = {"model.quantize": given.get("bnb_4bit_quant_type", "nf4")}
    if "bnb_4bit_use_double_quant" in given:
        found["model.double_quant"] = given["bnb_4bit_use_double_quant"]
    for key, held in given.items():
        if key not in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
            config.miss(("bnb_config_kwargs", key), held, "products are in model.dtype", False)
    return found


def eight_bits(value: Any, config: Config) -> dict[str, Any]:
    return {"model.quantize": "int8"} if value else {}


def all_linear(value: Any, config: Config) -> dict[str, Any]:
    return {"lora.target_modules": "all-linear"} if value else {}


def targets(value: Any, config: Config) -> dict[str, Any]:
    if config["lora_target_linear"]:
        raise Unmapped("lora_target_linear takes all linear layers already", matters=False)
    return {"lora.target_modules": value}


def total(value: Any, config: Config) -> dict[str, Any]:
    """Axolotl's `batch_size`: rows in an update, of which micro_batch_size go at once."""
    micro = config["micro_batch_size"]
    if value % micro:
        raise Unmapped(f"{value} rows in an update do not divide by micro_batch_size {micro}")
    return {"train.gradient_accumulation_steps": value // micro}


def per_epoch(name: str) -> Rule:
    def rule(value: Any, config: Config) -> dict[str, Any]:
        if value == 1:
            return {name: None}
        raise Unmapped(f"{value} in an epoch; {name} counts steps", matters=False)

    return rule


def half_precision(value: Any, config: Config) -> dict[str, Any]:
    return {"model.dtype": "bfloat16"} if value is True or value == "full" else {}


def template(value: Any, config: Config) -> dict[str, Any]:
    if value == "jinja":
        raise Unmapped("a chat template in the configuration; put it into the tokenizer")
    if not str(value).startswith(TEMPLATES):
        config.remark(
            f"chat_template {value}: the tokenizer's own is used here; `lowrank preview` shows it"
        )
    return {}


def task(value: Any, config: Config) -> dict[str, Any]:
    if value not in RL:
        raise Unmapped(f"{value!r}; of Axolotl's there are: {', '.join(RL)}")
    return {"train.task": RL[value], **({"train.loss_type": "ipo"} if value == "ipo" else {})}


def reward(value: Any, config: Config) -> dict[str, Any]:
    return {"train.task": "reward"} if value else {}


def trl(value: Any, config: Config) -> dict[str, Any]:
    """Axolotl's section `trl`: settings of GRPO and of preference training."""
    names = ("beta", "num_generations", "max_completion_length", "reward_weights", "temperature")
    speed = ("use_vllm", "vllm_mode", "log_completions")
    for key, held in value.items():
        if key not in (*names, "reward_funcs") and held not in (None, False):
            quick = key.startswith("vllm_") or key in speed
            config.miss(("trl", key), held, "a setting of TRL's that lowrank has not", not quick)
    found = {f"train.{key}": value[key] for key in names if value.get(key) is not None}
    if value.get("reward_funcs"):
        found |= reward_functions(value["reward_funcs"], config)
    return found


def special_tokens(value: Any, config: Config) -> dict[str, Any]:
    changed = {key: held for key, held in value.items() if key != "pad_token" and held is not None}
    if changed:
        raise Unmapped(f"{', '.join(changed)}: set in the tokenizer, not in a run")
    raise Unmapped("padding is never learnt, whichever token it is", matters=False)


def val_set(value: Any, config: Config) -> dict[str, Any]:
    return {"data.eval_split": value} if value else {}


RULES: dict[str, Rule] = {
    **{key: ARGUMENTS[key] for key in SHARED},
    "base_model": to("model.path"),
    "revision_of_model": to("model.revision"),
    "adapter": adapter,
    "load_in_4bit": four_bits,
    "load_in_8bit": eight_bits,
    "bnb_config_kwargs": taken,
    "gptq": no_effect("a quantised base is recognised"),
    "lora_r": to("lora.r"),
    "lora_alpha": to("lora.lora_alpha"),
    "lora_dropout": to("lora.lora_dropout"),
    "lora_target_linear": all_linear,
    "lora_target_modules": targets,
    "lora_target_parameters": to("lora.target_parameters"),
    "lora_modules_to_save": to("lora.modules_to_save"),
    "lora_fan_in_fan_out": no_effect("it is read from the layer"),
    "peft_layers_to_transform": to("lora.layers_to_transform"),
    "peft_layers_pattern": to("lora.layers_pattern"),
    "peft_use_dora": to("lora.use_dora"),
    "peft_use_rslora": to("lora.use_rslora"),
    "peft_init_lora_weights": to("lora.init_lora_weights"),
    "peft_layer_replication": to("lora.layer_replication"),
    "peft_trainable_token_indices": to("lora.trainable_token_indices"),
    "peft_ensure_weight_tying": to("lora.ensure_weight_tying"),
    "peft": unsupported("options of LoftQ and of torchao"),
    "loraplus_lr_ratio": to("train.loraplus_lr_ratio"),
    "lora_model_dir": unsupported("training an adapter on; from Python: is_trainable=True"),
    "datasets": training_sets,
    "test_datasets": evaluation_sets,
    "pretraining_dataset": pretraining_sets,
    "val_set_size": val_set,
    "sequence_len": to("data.max_length"),
    "sample_packing": to("train.packing"),
    "train_on_inputs": taken,
    "chat_template": template,
    "chat_template_jinja": unsupported(
        "a chat template in the configuration; put it into the tokenizer"
    ),
    "default_system_message": unsupported("a system message for rows that have none"),
    "micro_batch_size": to("train.batch_size"),
    "batch_size": total,
    "eval_batch_size": to("eval.batch_size"),
    "num_epochs": to("train.epochs"),
    "max_steps": max_steps,
    "optimizer": ARGUMENTS["optim"],
    "lr_scheduler": scheduler,
    "max_grad_norm": clipping,
    "evals_per_epoch": per_epoch("train.eval_steps"),
    "saves_per_epoch": per_epoch("train.save_steps"),
    "bf16": half_precision,
    "bfloat16": half_precision,
    "fp16": ARGUMENTS["fp16"],
    "float16": ARGUMENTS["fp16"],
    "hub_model_id": repo,
    "rl": task,
    "rl_beta": to("train.beta"),
    "kto_desirable_weight": to("train.desirable_weight"),
    "kto_undesirable_weight": to("train.undesirable_weight"),
    "reward_model": reward,
    "trl": trl,
    "special_tokens": special_tokens,
    "tokens": unsupported(
        "a vocabulary that grows; for new meanings: lora.trainable_token_indices"
    ),
    "added_tokens_overrides": unsupported("tokens renamed; set in the tokenizer"),
    "tokenizer_config": unsupported("a tokenizer of another model"),
    "overrides_of_model_config": unsupported("another model configuration; set in its config.json"),
    "early_stopping_patience": to("train.early_stopping_patience"),
    "relora_steps": unsupported("ReLoRA"),
    "cosine_min_lr_ratio": unsupported("a rate that stays above 0"),
    "cosine_constant_lr_ratio": unsupported("a rate that stays above 0"),
    "embedding_lr": unsupported("a rate of its own for embeddings"),
    "lr_groups": unsupported("rates of their own for parts of the model"),
    "unfrozen_parameters": unsupported("training some of the base's weights; lora.modules_to_save"),
    "curriculum_sampling": unsupported("rows in their order"),
    "shuffle_merged_datasets": unsupported("rows in their order", (None, True)),
    "dataset_exact_deduplication": unsupported("leaving out rows that stand twice"),
    "eot_tokens": unsupported("end tokens of turns; the chat template's are learnt"),
    "rpo_alpha": unsupported("RPO"),
    "orpo_alpha": unsupported("ORPO"),
    "simpo_gamma": unsupported("SimPO"),
    "cpo_alpha": unsupported("SimPO"),
    "dpo_use_weighting": unsupported("weighted DPO"),
    "float32": choice("model.dtype", {True: "float32", False: "auto"}),
    "fp8": unsupported("products in 8 bits"),
    "qat": unsupported("training for a quantisation to come"),
    "quantization": no_effect("quantising the result is lowrank quantize"),
    "use_dynamic_finetune": unsupported("dynamic fine-tuning (DFT)"),
    "use_pose": unsupported("PoSE"),
    "dataset_shard_num": unsupported("a part of the data sets"),
    "dataset_shard_idx": unsupported("a part of the data sets"),
    "dataloader_drop_last": ARGUMENTS["dataloader_drop_last"],
    "min_sample_len": unsupported("leaving out short rows", (*NOTHING, 1, 2)),
    "loraplus_lr_embedding": unsupported("a rate of its own for LoRA+'s embeddings", (1e-6,)),
    "lr_quadratic_warmup": unsupported("a warmup that is not linear"),
    "lr_div_factor": unsupported("one-cycle's start"),
    "overrides_of_model_kwargs": unsupported("options of from_pretrained"),
    "resize_token_embeddings_to_32x": unsupported("a vocabulary that grows"),
    "fix_untrained_tokens": unsupported("new values for rows of the embedding"),
    "num_labels": no_effect("the data tell how many labels there are"),
    "auto_resume_from_checkpoints": no_effect("lowrank train --resume auto"),
    "process_reward_model": unsupported("reward models of steps"),
    "max_prompt_len": no_effect("a prompt's length is limited with its answer's"),
    "plugins": no_effect("Axolotl's own; what they add beyond speed has to be looked up"),
    "strict": no_effect("unknown keys are always errors here"),
    "trust_remote_code": no_effect("no code out of repositories is run"),
    **alike(no_effect("the configuration of the model says it"), "model_type", "tokenizer_type"),
    **alike(no_effect("the configuration of the model says it"), "is_llama_derived_model"),
    **alike(no_effect("the configuration of the model says it"), "is_mistral_derived_model"),
    **alike(no_effect("the configuration of the model says it"), "is_qwen_derived_model"),
    **alike(no_effect("the configuration of the model says it"), "is_falcon_derived_model"),
    **alike(no_effect("the configuration of the model says it"), "tokenizer_use_fast"),
    **alike(no_effect("the configuration of the model says it"), "base_model_config"),
    **alike(CACHE, "dataset_prepared_path", "dataset_processes", "dataset_keep_in_memory"),
    **alike(CACHE, "push_dataset_to_hub", "hf_use_auth_token", "skip_prepare_dataset"),
    **alike(SPEED, "flash_attention", "sdp_attention", "xformers_attention", "eager_attention"),
    **alike(SPEED, "flex_attention", "s2_attention", "flash_attn_cross_entropy"),
    **alike(SPEED, "flash_attn_rms_norm", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp"),
    **alike(SPEED, "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "low_cpu_mem_usage"),
    **alike(SPEED, "pad_to_sequence_len", "eval_sample_packing", "batch_flattening"),
    **alike(SPEED, "sample_packing_bin_size", "sample_packing_group_size", "gc_steps"),
    **alike(SPEED, "total_num_tokens", "sample_packing_eff_est", "attn_implementation"),
    **alike(SPEED, "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_swiglu"),
    **alike(SPEED, "liger_fused_linear_cross_entropy", "liger_layer_norm", "cut_cross_entropy"),
    **alike(SPEED, "lora_on_cpu", "embeddings_skip_upcast", "unsloth_lora_mlp"),
    **alike(CACHE, "dataset_num_proc", "preprocess_iterable", "is_preprocess"),
    **alike(SPEED, "tiled_mlp", "torch_compile_mode", "multipack_real_batches"),
    **alike(SPEED, "unsloth_lora_qkv", "unsloth_lora_o", "unsloth_rope", "flash_optimum"),
    **alike(PLACE, "device", "world_size", "ddp", "heads_k_stride", "ring_attn_func"),
    **alike(PLACE, "device_map", "max_memory", "gpu_memory_limit", "sequence_parallel_degree"),
    **alike(PLACE, "fsdp_final_state_dict_type", "fsdp_version", "use_ray", "vllm"),
    **alike(PLACE, "tensor_parallel_size", "context_parallel_size", "dp_shard_size"),
    **alike(TELLING, "wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_mode"),
    **alike(TELLING, "wandb_log_model", "wandb_run_id", "mlflow_tracking_uri", "use_tensorboard"),
    **alike(TELLING, "mlflow_experiment_name", "mlflow_run_name", "hf_mlflow_log_artifacts"),
    **alike(TELLING, "use_comet", "comet_api_key", "comet_project_name", "debug"),
    **alike(TELLING, "profiler_steps", "loss_watchdog_threshold", "loss_watchdog_patience"),
    **alike(EVALUATION, "eval_table_size", "eval_max_new_tokens", "do_causal_lm_eval"),
    **alike(EVALUATION, "eval_causal_lm_metrics", "do_bench_eval", "bench_dataset"),
}
RULES["eval_steps"] = every("train.eval_steps", "eval_strategy")
DEFAULTS: dict[str, Any] = {
    "sequence_len": 512,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1.0,
    "lr_scheduler": "cosine",
    "weight_decay": 0.0,
    "lora_dropout": 0.0,
    "group_by_length": False,
}
MARKS = ("base_model", "micro_batch_size", "sequence_len", "adapter", "val_set_size", "num_epochs")
