"""Configurations as users of other programs write them, and the data they name."""

import json
from pathlib import Path

AXOLOTL = """\
base_model: acme/Tiny-1B
load_in_8bit: false
load_in_4bit: true
adapter: qlora

datasets:
  - path: {folder}/chats.jsonl
    type: chat_template
    field_messages: talk
    message_property_mappings:
      role: from
      content: value
    shards: 4
val_set_size: 0.25
output_dir: {folder}/out

sequence_len: 128
sample_packing: true
lora_r: 8
lora_alpha: 24
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
neftune_noise_alpha: 5
lora_dropuot: 0.1
special_tokens:
  pad_token: <pad>
"""
LLAMA_FACTORY = """\
### model
model_name_or_path: acme/Tiny-1B
quantization_bit: 8
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: q_proj, v_proj
use_rslora: true
### dataset
dataset: ours,theirs
dataset_dir: {folder}
template: llama3
cutoff_len: 96
preprocessing_num_workers: 16
### output
output_dir: {folder}/out
save_steps: 500
plot_loss: true
hf_hub_token: hf_private
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: constant_with_warmup
warmup_ratio: 0.1
bf16: true
val_size: 2
use_galore: true
"""
TRL = """\
model_name_or_path: acme/Tiny-1B
torch_dtype: float32
dataset_name: {folder}/pairs.jsonl
use_peft: true
lora_r: 4
lora_alpha: 12
lora_target_modules: [q_proj, up_proj]
load_in_4bit: true
bnb_4bit_quant_type: fp4
completion_only_loss: false
max_length: 128
learning_rate: 2.0e-4
per_device_train_batch_size: 4
max_steps: 40
warmup_steps: 5
lr_scheduler_type: cosine
attn_implementation: flash_attention_2
neftune_noise_alpha: 0
output_dir: {folder}/out
"""
MLX = """\
model: acme/Tiny-1B
train: true
fine_tune_type: dora
data: {folder}/mlx
mask_prompt: true
num_layers: 2
batch_size: 4
iters: 60
learning_rate: 1e-5
optimizer: adamw
optimizer_config:
  adamw:
    weight_decay: 0.05
    eps: 1e-6
grad_accumulation_steps: 2
lora_parameters:
  keys: [self_attn.q_proj, self_attn.v_proj]
  rank: 4
  scale: 2.5
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 3
  warmup_init: 1e-7
  arguments: [1e-4, 30, 0.0]
"""
# what each becomes; of a program's defaults, those that are not lowrank's own
SETTINGS = {
    "axolotl": {
        "model.path": "acme/Tiny-1B",
        "model.quantize": "nf4",
        "lora.r": 8,
        "lora.lora_alpha": 24,
        "lora.lora_dropout": 0.05,
        "lora.target_modules": "all-linear",
        "data.train": "{folder}/chats.jsonl",
        "data.shape": "sharegpt",
        "data.columns": {"talk": "conversations"},
        "data.loss_on": "assistant",
        "data.eval_split": 0.25,
        "data.max_length": 128,
        "train.method": "lora",
        "train.packing": True,
        "train.gradient_accumulation_steps": 4,
        "train.batch_size": 2,
        "train.epochs": 2,
        "train.optimizer": "adamw",
        "train.lr_scheduler_type": "cosine",
        "train.learning_rate": 2e-4,
        "train.warmup_steps": 10,
        "train.save_steps": None,
        "train.weight_decay": 0.0,
        "train.group_by_length": False,
        "output.dir": "{folder}/out",
    },
    "llama-factory": {
        "model.path": "acme/Tiny-1B",
        "train.task": "sft",
        "model.quantize": "int8",
        "model.dtype": "bfloat16",
        "lora.r": 4,
        "lora.lora_alpha": 8,  # LLaMA-Factory's default: twice the rank
        "lora.lora_dropout": 0.0,
        "lora.target_modules": ["q_proj", "v_proj"],
        "lora.use_rslora": True,
        "data.train": "{folder}/instructions.json",
        "data.shape": "alpaca",
        "data.columns": {"question": "instruction", "answer": "output"},
        "data.loss_on": "assistant",
        "data.chat_template": True,
        "data.max_length": 96,
        "data.eval_split": 2,
        "train.method": "lora",
        "train.save_steps": 500,
        "train.batch_size": 1,
        "train.gradient_accumulation_steps": 8,
        "train.learning_rate": 1e-4,
        "train.epochs": 3.0,
        "train.lr_scheduler_type": "constant",
        "train.warmup_ratio": 0.1,
        "train.group_by_length": False,
        "train.gradient_checkpointing": True,
        "output.dir": "{folder}/out",
    },
    "trl": {
        "model.path": "acme/Tiny-1B",
        "train.task": "sft",
        "model.dtype": "float32",
        "model.quantize": "fp4",
        "lora.r": 4,
        "lora.lora_alpha": 12,
        "lora.lora_dropout": 0.05,
        "lora.target_modules": ["q_proj", "up_proj"],
        "data.train": "{folder}/pairs.jsonl",
        "data.loss_on": "all",
        "data.max_length": 128,
        "train.method": "lora",
        "train.learning_rate": 2e-4,
        "train.batch_size": 4,
        "train.epochs": 3.0,
        "train.max_steps": 40,
        "train.warmup_steps": 5,
        "train.lr_scheduler_type": "cosine",
        "train.gradient_checkpointing": True,
        "train.group_by_length": False,
        "output.dir": "{folder}/out",
    },
    "mlx-lm": {
        "model.path": "acme/Tiny-1B",
        "lora.use_dora": True,
        "lora.r": 4,
        "lora.lora_alpha": 10.0,  # mlx-lm multiplies B·A by scale: 10 / 4
        "lora.lora_dropout": 0.0,
        "lora.target_modules": ["self_attn.q_proj", "self_attn.v_proj"],
        "data.train": "{folder}/mlx/train.jsonl",
        "data.eval": "{folder}/mlx/valid.jsonl",
        "train.method": "lora",
        "train.batch_size": 4,
        "train.gradient_accumulation_steps": 2,
        "train.max_steps": 30,  # 60 batches, two in an update
        "train.learning_rate": 1e-4,
        "train.lr_scheduler_type": "cosine",
        "train.warmup_steps": 3,
        "train.optimizer": "adamw",
        "train.weight_decay": 0.05,
        "train.max_grad_norm": 1e9,
        "train.eval_steps": 100,
        "train.save_steps": 50,
        "train.seed": 0,
        "output.dir": "adapters",
    },
}
TEXTS = {"axolotl": AXOLOTL, "llama-factory": LLAMA_FACTORY, "trl": TRL, "mlx-lm": MLX}


def write(folder: Path, program: str) -> Path:
    """The configuration in `folder`, with the data that it names."""
    path = folder / f"{program}.yaml"
    path.write_text(TEXTS[program].replace("{folder}", str(folder)), encoding="utf-8")
    answers = [("Where is my parcel?", "in Bern"), ("Who pays?", "you"), ("Why?", "so")] * 3
    _lines(
        folder / "chats.jsonl",
        [
            {"talk": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for q, a in answers
        ],
    )
    _lines(folder / "pairs.jsonl", [{"prompt": q, "completion": a} for q, a in answers])
    (folder / "mlx").mkdir(exist_ok=True)
    for part in ("train", "valid", "test"):
        chat = [
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
            for q, a in answers
        ]
        _lines(folder / "mlx" / f"{part}.jsonl", [{"messages": turns} for turns in chat])
    rows = [{"question": q, "answer": a} for q, a in answers]
    (folder / "instructions.json").write_text(json.dumps(rows), encoding="utf-8")
    described = {
        "ours": {"file_name": "instructions.json", "columns": {"prompt": "question", "response": "answer"}},
        "theirs": {
            "hf_hub_url": "acme/talks",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(described), encoding="utf-8")
    return path


def _lines(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
