"""Programs of people who know only PEFT: `python third_party.py FOLDER NAME…` prints what each one found.

Nothing here knows of lowrank. tests run it as it is and under `python -m lowrank.compat`, and compare.
"""

import json
import sys
from pathlib import Path

import text
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}
STEPS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.02,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "seed": 3,
}


def base():
    return tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32)


def filled(model, seed=5):
    """Every parameter that is trained gets numbers that depend on its name's place alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def losses(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


def written(folder):
    """The files below a folder, and the keys of adapters in it."""
    files = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())
    return files, {
        name: sorted(load_file(Path(folder) / name)) for name in files if "adapter_model" in name
    }


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tiny.IDS).logits.flatten()[::97].tolist()


# --- transformers -----------------------------------------------------------------------------------


def trainer(folder):
    """Train with evaluation, save the adapter alone at each step, load the best; then resume."""
    options = transformers.TrainingArguments(
        folder,
        **{**STEPS, "save_strategy": "steps"},
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tiny.IDS.repeat(3, 1)]

    def train(**resume):
        model = filled(get_peft_model(base(), LoraConfig(**LORA, task_type="CAUSAL_LM")))
        run = transformers.Trainer(model, options, train_dataset=rows, eval_dataset=rows[:2])
        run.train(**resume)
        return run

    first, again = train(), train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    files, keys = written(f"{folder}/checkpoint-3")
    return {
        "losses": losses(first),
        "eval": losses(first, "eval_loss"),
        "resumed": losses(again),
        "best": logits(first.model),
        "adapter files": [name for name in files if "adapter" in name or "model" in name],
        "keys": keys["adapter_model.safetensors"],
    }


def mixin(folder):
    """The adapter methods of transformers' own models, and of its Auto classes and pipelines."""
    model = base()
    model.save_pretrained(f"{folder}/base")
    text.byte_tokenizer().save_pretrained(f"{folder}/base")
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    plain = logits(model)
    model.add_adapter(LoraConfig(**LORA), adapter_name="first")
    first = logits(filled(model))
    model.disable_adapters()
    disabled = logits(model)
    model.enable_adapters()
    model.save_pretrained(f"{folder}/first")
    model.add_adapter(LoraConfig(**{**LORA, "target_modules": "all-linear"}), adapter_name="second")
    active = model.active_adapters()
    second = logits(filled(model))
    model.set_adapter("first")
    back = logits(model)
    model.delete_adapter("second")

    files, keys = written(f"{folder}/first")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/first")
    other = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    other.load_adapter(f"{folder}/first", adapter_name="again", is_trainable=True)
    pipe = transformers.pipeline("text-generation", f"{folder}/first", device="cpu")
    said = pipe("abc", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    return {
        "plain": plain,
        "first": first,
        "disabled is plain": disabled == plain,
        "second": second,
        "active": active,
        "back is first": back == first,
        "left": [list(model.peft_config), model.active_adapters()],
        "keys": [files, keys],
        "loaded": logits(loaded),
        "loaded again": logits(other),
        "trainable": sum(p.numel() for p in other.parameters() if p.requires_grad),
        "said": said,
    }


def switched(folder):
    """Two adapters that each save the same module whole, and train rows of the same embedding."""
    model, seen = base(), {}
    config = LoraConfig(**LORA, modules_to_save=["lm_head"], trainable_token_indices=[4, 8])
    for seed, name in enumerate(("first", "second")):
        model.add_adapter(config, adapter_name=name)
        seen[name] = logits(filled(model, seed))
    model.set_adapter("first")
    again = logits(model)
    model.disable_adapters()
    disabled = logits(model)
    model.enable_adapters()
    return {**seen, "first again": again, "disabled": disabled, "enabled": logits(model)}


def whole(folder):
    """A module that is saved whole, and DoRA's magnitudes, through transformers' own saving and loading."""
    base().save_pretrained(f"{folder}/base")
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    model.add_adapter(LoraConfig(**LORA, modules_to_save=["lm_head"], use_dora=True))
    before = logits(filled(model))
    model.save_pretrained(f"{folder}/adapter")
    other = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    other.load_adapter(f"{folder}/adapter", adapter_name="again")
    adapted = PeftModel.from_pretrained(base(), f"{folder}/adapter")
    return {
        "before": before,
        "loaded": logits(other),
        "with PeftModel": logits(adapted),
        "keys": written(f"{folder}/adapter")[1],
    }


# --- TRL --------------------------------------------------------------------------------------------


def sft(folder, model=None):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    run = SFTTrainer(
        model or base(),
        SFTConfig(folder, **STEPS, max_length=32, bf16=False, gradient_checkpointing=True),
        train_dataset=Dataset.from_list(text.pairs(8)),
        processing_class=text.byte_tokenizer(),
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
    )
    filled(run.model)
    run.train()
    run.save_model(f"{folder}/out")
    return {"losses": losses(run), "keys": written(f"{folder}/out")[1]}


def qlora(folder):
    """The same on a base that bitsandbytes holds in 4 bits."""
    base().save_pretrained(f"{folder}/base")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/base", quantization_config=config, dtype=torch.float32
    )
    return sft(folder, model)


def dpo(folder):
    """A new adapter (the reference is the base), and one that was there (the reference is its copy)."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{**pair, "chosen": pair["completion"], "rejected": "no"} for pair in text.pairs(8)]
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]

    def train(model, **options):
        return DPOTrainer(
            model,
            args=DPOConfig(folder, **STEPS, max_length=32, bf16=False),
            train_dataset=Dataset.from_list(rows),
            processing_class=text.byte_tokenizer(),
            **options,
        )

    config = LoraConfig(**LORA, task_type="CAUSAL_LM")
    new = train(base(), peft_config=config)
    filled(new.model)
    new.train()
    there = train(filled(get_peft_model(base(), config)))
    there.train()
    there.save_model(f"{folder}/out")
    return {
        "new": losses(new),
        "there": losses(there),
        "adapters": sorted(there.model.peft_config),
        "files": written(f"{folder}/out"),
    }


def reward(folder):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    model = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32).config
    model.num_labels = 1
    torch.manual_seed(0)
    classifier = transformers.LlamaForSequenceClassification(model)
    rows = [
        {"chosen": p["prompt"] + p["completion"], "rejected": p["prompt"]} for p in text.pairs(8)
    ]
    run = RewardTrainer(
        classifier,
        RewardConfig(folder, **STEPS, max_length=32, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=text.byte_tokenizer(),
        peft_config=LoraConfig(**LORA, task_type="SEQ_CLS"),
    )
    filled(run.model)
    run.train()
    run.save_model(f"{folder}/out")
    return {"losses": losses(run), "keys": written(f"{folder}/out")[1]}


if __name__ == "__main__":
    found = {name: globals()[name](f"{sys.argv[1]}/{name}") for name in sys.argv[2:]}
    found["class"] = PeftModel.__module__
    print("FOUND", json.dumps(found))
