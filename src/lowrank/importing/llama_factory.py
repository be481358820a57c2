"""LLaMA-Factory's configurations, and the dataset_info.json beside them."""

import json
from pathlib import Path
from typing import Any

from lowrank.importing.config import Config, Unmapped
from lowrank.importing.data import DataSet, Reading, data_name, together
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
    taken,
    to,
    unsupported,
    words,
)
from lowrank.importing.trainer import ARGUMENTS
from lowrank.importing.trainer import DEFAULTS as TRAINER_DEFAULTS

STAGES = {"sft": "sft", "pt": "text", "rm": "reward", "dpo": "dpo", "kto": "kto"}
# who speaks, where a description says nothing else: what lowrank reads of ShareGPT's
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI = {"role_tag": "role", "content_tag": "content"}
KNOWN_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}
WITH_QUERY = "{{ instruction }}{% if input is defined and input %}\n{{ input }}{% endif %}"


def target(value: Any, config: Config) -> dict[str, Any]:
    names = words(value)
    return {"lora.target_modules": "all-linear" if names == ["all"] else names}


def alpha(value: Any, config: Config) -> dict[str, Any]:
    return {"lora.lora_alpha": value}


def rank(value: Any, config: Config) -> dict[str, Any]:
    alpha = {} if config["lora_alpha"] else {"lora.lora_alpha": 2 * value}
    return {"lora.r": value, **alpha}


def pissa(value: Any, config: Config) -> dict[str, Any]:
    if not value:
        return {}
    steps = config["pissa_iter"]
    return {"lora.init_lora_weights": "pissa" if steps == -1 else f"pissa_niter_{steps or 16}"}


def bits(value: Any, config: Config) -> dict[str, Any]:
    if config["quantization_method"] not in (None, "bnb", "bitsandbytes"):
        raise Unmapped(f"quantisation by {config['quantization_method']}; here by bitsandbytes")
    if value not in (4, 8):
        raise Unmapped(f"{value} bits; here 4 or 8")
    kind = config["quantization_type"] or "nf4"
    return {"model.quantize": "int8" if value == 8 else kind}


def template(value: Any, config: Config) -> dict[str, Any]:
    if value in ("empty", "vanilla", "default", "alpaca"):
        if value == "empty":
            return {"data.chat_template": False}
        raise Unmapped(f"the template {value!r}; data.prompt_template can say it in Jinja")
    config.remark(
        f"template {value}: the tokenizer's own chat template is used here; `lowrank preview` shows it"
    )
    return {"data.chat_template": True}


def limit(value: Any, config: Config) -> dict[str, Any]:
    if len(words(config["dataset"] or "")) > 1:
        raise Unmapped("so many rows of each data set; data.limit is for all together")
    return {"data.limit": value}


def packing(value: Any, config: Config) -> dict[str, Any]:
    if value:
        config.remark("packing: packed rows are always kept apart here, as with neat_packing")
    return {"train.packing": bool(value)}


def evaluated(value: Any, config: Config) -> dict[str, Any]:
    names = [name for entry in words(value) for name in _data_set(entry, config).names]
    return {"data.eval": names[0] if len(names) == 1 else names}


def held_out(value: Any, config: Config) -> dict[str, Any]:
    return {"data.eval_split": value} if value else {}


def data_sets(value: Any, config: Config) -> dict[str, Any]:
    sets = []
    for name in words(value):
        try:
            sets.append(_data_set(name, config))
        except Unmapped as unmapped:
            config.miss(("dataset",), name, str(unmapped))
    return together(sets, config, lambda other: other.keys[-1])


def _data_set(name: str, config: Config) -> DataSet:
    keys = ("dataset", name)
    folder = config["dataset_dir"] or "data"
    if folder == "ONLINE":
        return DataSet([data_name(name)], Reading(loss_on=_loss_on(config)), keys)
    described = _descriptions(folder, config)
    if name not in described:
        raise Unmapped(f"{name} is not in dataset_info.json")
    about = described[name]
    for key in ("script_url", "ms_hub_url", "om_hub_url", "cloud_file_name"):
        if key in about and "hf_hub_url" not in about:
            raise Unmapped(f"{name} is named by {key}; give a file or a name on the hub")
    if "hf_hub_url" in about:
        path = data_name(about["hf_hub_url"], about.get("subset"), about.get("split"))
    else:
        path = str(_data_folder(folder, config) / about["file_name"])
    return DataSet([path], _reading(name, about, config), keys)


def _data_folder(folder: str, config: Config) -> Path:
    """`dataset_dir` as it stands (from where the command runs), or beside the configuration."""
    beside = [Path(folder), config.path.parent / folder, config.path.parent]
    return next((p for p in beside if (p / "dataset_info.json").is_file()), Path(folder))


def _descriptions(folder: str, config: Config) -> dict[str, Any]:
    path = _data_folder(folder, config) / "dataset_info.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unmapped(
            f"{path} is not here: it says where the rows are and what their columns mean"
        ) from None
    except json.JSONDecodeError as error:
        raise Unmapped(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None


def _reading(name: str, about: dict[str, Any], config: Config) -> Reading:
    columns = about.get("columns", {})
    if any(columns.get(kind) for kind in ("images", "videos", "audios")):
        raise Unmapped(f"{name} holds images, videos or audios; only text is trained on")
    if about.get("num_samples"):
        raise Unmapped(f"{name} has num_samples; data.limit is for all rows together")
    stage = config["stage"]
    if about.get("formatting", "alpaca") == "sharegpt":
        return _spoken(name, about, columns, config)
    asked = columns.get("prompt", "instruction")
    if stage == "pt":
        return Reading("text", {asked: "text"})
    named = {
        columns[k]: ours
        for k, ours in (("system", "system"), ("history", "history"))
        if k in columns
    }
    named = {asked: "instruction", **named}
    if columns.get("query"):
        named[columns["query"]] = "input"
    if about.get("ranking"):
        pair = {columns.get(kind, kind): kind for kind in ("chosen", "rejected")}
        return Reading("alpaca-preference", {**named, **pair})
    answer = columns.get("response", "output")
    if columns.get("kto_tag"):
        judged = {answer: "completion", columns["kto_tag"]: "label"}
        if named == {asked: "instruction"}:
            return Reading("kto", {asked: "prompt", **judged})
        return Reading("kto", {**named, **judged}, WITH_QUERY)
    return Reading("alpaca", {**named, answer: "output"}, loss_on=_loss_on(config))


def _spoken(name: str, about: dict[str, Any], columns: dict[str, Any], config: Config) -> Reading:
    tags = {**TAGS, **about.get("tags", {})}
    openai = {k: tags[k] for k in OPENAI} == OPENAI
    strange = [f"{tag}: {tags[tag]}" for tag, known in KNOWN_TAGS.items() if tags[tag] not in known]
    if strange or not (openai or (tags["role_tag"], tags["content_tag"]) == ("from", "value")):
        raise Unmapped(
            f"{name} has tags of its own ({', '.join(strange) or tags['role_tag']}); here turns have role and "
            "content, or from and value"
        )
    said = columns.get("messages", "conversations")
    named = {columns[k]: k for k in ("system", "tools") if columns.get(k)}
    if about.get("ranking"):
        pair = {columns.get(kind, kind): kind for kind in ("chosen", "rejected")}
        return Reading("sharegpt-preference", {said: "conversations", **named, **pair})
    if columns.get("kto_tag"):
        if not openai:
            raise Unmapped(
                f"{name}: KTO labels beside from and value; here beside role and content"
            )
        return Reading("messages-kto", {said: "messages", columns["kto_tag"]: "label"})
    if openai and "system" not in named:
        return Reading("messages", {said: "messages", **named}, loss_on=_loss_on(config))
    return Reading("sharegpt", {said: "conversations", **named}, loss_on=_loss_on(config))


def _loss_on(config: Config) -> str:
    if config["stage"] != "sft":
        return "completion"
    if config["train_on_prompt"]:
        return "all"
    return "last" if config["mask_history"] else "assistant"


RULES: dict[str, Rule] = {
    **ARGUMENTS,
    "stage": choice("train.task", STAGES),
    "finetuning_type": choice("train.method", {"lora": "lora", "full": "full"}),
    "model_name_or_path": to("model.path"),
    "model_revision": to("model.revision"),
    "lora_rank": rank,
    "lora_alpha": alpha,
    "lora_dropout": to("lora.lora_dropout"),
    "lora_target": target,
    "additional_target": to("lora.modules_to_save", words),
    "use_rslora": to("lora.use_rslora"),
    "use_dora": to("lora.use_dora"),
    "loraplus_lr_ratio": to("train.loraplus_lr_ratio"),
    "pissa_init": pissa,
    "pissa_iter": taken,
    "pissa_convert": no_effect("an adapter started by PiSSA is saved with its start beside it"),
    "quantization_bit": bits,
    "quantization_type": taken,
    "quantization_method": taken,
    "double_quantization": to("model.double_quant"),
    "dataset": data_sets,
    "dataset_dir": taken,
    "eval_dataset": evaluated,
    "val_size": held_out,
    "template": template,
    "cutoff_len": to("data.max_length"),
    "max_samples": limit,
    "train_on_prompt": taken,
    "mask_history": taken,
    "packing": packing,
    "neat_packing": to("train.packing"),
    "disable_gradient_checkpointing": to("train.gradient_checkpointing", lambda value: not value),
    "bf16": choice("model.dtype", {True: "bfloat16", False: "auto", "auto": "auto"}),
    "pure_bf16": choice("model.dtype", {True: "bfloat16", False: "auto"}),
    "pref_beta": to("train.beta"),
    "pref_loss": choice("train.loss_type", {name: name for name in ("sigmoid", "hinge", "ipo")}),
    "dpo_label_smoothing": to("train.label_smoothing"),
    "kto_chosen_weight": to("train.desirable_weight"),
    "kto_rejected_weight": to("train.undesirable_weight"),
    "pref_ftx": unsupported("a supervised loss beside the preference's"),
    "adapter_name_or_path": unsupported("training an adapter on; from Python: is_trainable=True"),
    "resize_vocab": unsupported("a vocabulary that grows"),
    "add_tokens": unsupported("a vocabulary that grows"),
    "add_special_tokens": unsupported("a vocabulary that grows"),
    "new_special_tokens_config": unsupported("a vocabulary that grows"),
    "rope_scaling": unsupported("another scaling of positions; set it in the model's config.json"),
    "shift_attn": unsupported("LongLoRA's shifted attention"),
    "moe_aux_loss_coef": unsupported("another weight of the router's loss"),
    "mix_strategy": unsupported("mixing by probability; data sets follow one another", ("concat",)),
    "interleave_probs": unsupported("mixing by probability; data sets follow one another"),
    "streaming": unsupported("streaming; rows are read before training starts"),
    "default_system": unsupported("a system message for rows that have none"),
    "tool_format": no_effect("tools are written by the chat template"),
    "enable_thinking": unsupported("thinking switched in the template", ("True", True)),
    "use_galore": unsupported("GaLore"),
    "use_apollo": unsupported("APOLLO"),
    "use_badam": unsupported("BAdam"),
    "use_adam_mini": unsupported("Adam-mini"),
    "use_muon": unsupported("Muon"),
    "use_dft_loss": unsupported("the DFT loss"),
    "use_llama_pro": unsupported("LLaMA Pro"),
    "ref_model": unsupported("another reference model; here it is the base with the adapter off"),
    "early_stopping_steps": to("train.early_stopping_patience"),
    "disable_shuffling": unsupported("rows in their order; they are shuffled by train.seed"),
    "fp8": unsupported("products in 8 bits"),
    "train_from_scratch": unsupported("starting from random weights"),
    "mixture_of_depths": unsupported("mixture of depths"),
    "pref_bco_weight": unsupported("BCO beside DPO"),
    "simpo_gamma": unsupported("SimPO", (0.5,)),
    "ld_alpha": unsupported("LD-DPO"),
    "loraplus_lr_embedding": unsupported("a rate of its own for LoRA+'s embeddings", (1e-6,)),
    "split_special_tokens": unsupported("special tokens in pieces"),
    "freeze_trainable_modules": unsupported("freezing layers"),
    "freeze_trainable_layers": unsupported("freezing layers"),
    "create_new_adapter": no_effect("a run makes a new adapter"),
    "trust_remote_code": no_effect("no code out of repositories is run"),
    **alike(SPEED, "flash_attn", "use_unsloth", "use_unsloth_gc", "enable_liger_kernel"),
    **alike(SPEED, "use_reentrant_gc", "low_cpu_mem_usage", "upcast_layernorm", "use_kv_cache"),
    **alike(SPEED, "upcast_lmhead_output", "use_fast_tokenizer", "quantization_device_map"),
    **alike(CACHE, "overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size"),
    **alike(CACHE, "tokenized_path", "cache_dir", "buffer_size", "media_dir"),
    **alike(PLACE, "ray_run_name", "ray_storage_path", "ray_num_workers", "placement_strategy"),
    **alike(PLACE, "resources_per_worker", "offload_folder"),
    **alike(PLACE, "use_mca", "fp8_backend", "fp8_enable_fsdp_float8_all_gather"),
    **alike(EVALUATION, "do_sample", "num_beams", "repetition_penalty", "infer_dtype"),
    **alike(TELLING, "om_hub_token", "export_dir", "export_size"),
    **alike(SPEED, "use_v1_kernels"),
    **alike(TELLING, "plot_loss", "use_swanlab", "swanlab_project", "swanlab_run_name"),
    **alike(TELLING, "swanlab_mode", "swanlab_api_key", "swanlab_workspace", "print_param_status"),
    **alike(TELLING, "hf_hub_token", "ms_hub_token", "include_effective_tokens_per_second"),
    **alike(EVALUATION, "compute_accuracy", "eval_on_each_dataset", "eval_num_beams"),
    **alike(EVALUATION, "max_new_tokens", "temperature", "top_p", "top_k", "infer_backend"),
    **alike(no_effect("padding is never learnt"), "ignore_pad_token_for_loss"),
    **alike(no_effect("only text is trained on"), "image_max_pixels", "video_max_pixels"),
    **alike(no_effect("only text is trained on"), "freeze_vision_tower", "image_min_pixels"),
    **alike(no_effect("only text is trained on"), "freeze_multi_modal_projector", "video_fps"),
}
DEFAULTS = {
    **TRAINER_DEFAULTS,
    "stage": "sft",
    "lora_rank": 8,
    "lora_target": "all",
    "lora_dropout": 0.0,
    "disable_gradient_checkpointing": False,
}
MARKS = ("stage", "finetuning_type", "cutoff_len", "lora_target", "lora_rank", "dataset_dir")
