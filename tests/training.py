"""Short trainings of a tiny model, to the last bit the same each time."""

import gc

import text
import tiny
import torch

from lowrank import LoraConfig, compat, get_peft_model
from lowrank.train.data.rows import Row
from lowrank.train.settings import EvalSettings, TrainSettings
from lowrank.train.tasks.sft import train_sft

ROWS = [
    Row(pair["prompt"], pair["completion"] * (1 + i % 3), f"f:{i}")
    for i, pair in enumerate(text.pairs(22))
]
FAST = TrainSettings(epochs=2, learning_rate=1e-2, batch_size=4, logging_steps=3, seed=7)


def adapted(layers=2, **options):
    torch.manual_seed(3)
    model = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32, layers=layers)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config)


def fit(model, tokenizer, data, folder, settings=FAST, **options):
    gc.freeze()  # a run collects garbage twice, and would go through all that the tests have imported
    try:
        with compat.standing_in():
            return train_sft(
                model, tokenizer, *data, folder, settings, EvalSettings(batch_size=4), **options
            )
    finally:
        gc.unfreeze()
