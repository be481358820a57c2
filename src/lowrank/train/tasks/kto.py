"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024) of answers that were judged good or bad."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from lowrank.train.data.encode import pad_id
from lowrank.train.data.shapes import Judged
from lowrank.train.evaluate import Evaluation
from lowrank.train.run.trainer import Training
from lowrank.train.settings import Sections, TrainSettings
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.on_trl import LOSSES, beta_of, check_settings, train_on_trl
from lowrank.train.tasks.preference import (
    Preferences,
    against_reference,
    encode_preferences,
    judged_batch,
)

BALANCED = (1.0, 4 / 3)  # λ_D n_D / (λ_U n_U): Ethayarajh et al. 2024, eq. 8


def prepare(
    rows: Sequence[Judged],
    tokenizer: Any,
    settings: Sections,
    *,
    max_length: int,
    like: dict[str, Any] | None = None,
) -> Preferences:
    """Raises TaskSettingsError for settings that KTO cannot honour."""
    train, problems = settings.train, []
    if train.batch_size == 1 and (train.loss_type or "kto") == "kto":
        problems.append(
            "train.batch_size 1: KTO measures how far the model has moved on the prompts of a batch "
            "with each other's answers, so it needs 2 or more"
        )
    check_settings("kto", settings, problems)
    template = settings.data.chat_template
    found = encode_preferences(rows, tokenizer, max_length=max_length, chat_template=template)
    return dataclasses.replace(found, note=balance(found, train)) if like is None else found


def balance(data: Preferences, settings: TrainSettings) -> str:
    """What to set where good and bad answers do not weigh alike; empty where they do."""
    good = sum(example["label"] for example in data.examples)
    bad = len(data.examples) - good
    if not good or not bad:
        return f"\nall of them are {'good' if good else 'bad'}: KTO learns from the difference to the others"
    weights = settings.desirable_weight or 1.0, settings.undesirable_weight or 1.0
    least, most = BALANCED
    if least <= weights[0] * good / (weights[1] * bad) <= most:
        return ""
    low, high = (weights[0] * good / (bad * bound) for bound in (most, least))
    if high >= 1:
        return f"\n{good} good and {bad} bad ones: they weigh alike with train.undesirable_weight {low:.3g} to {high:.3g}"
    low, high = (weights[1] * bad * bound / good for bound in (least, most))
    return f"\n{good} good and {bad} bad ones: they weigh alike with train.desirable_weight {low:.3g} to {high:.3g}"


def train(given: Given) -> Training:
    """Train what is trainable in the model, in place; its reference is the model with its adapters off."""
    settings = given.settings
    arguments = {
        "beta": beta_of("kto", settings.train),
        "loss_type": settings.train.loss_type or LOSSES["kto"][0],
        "desirable_weight": settings.train.desirable_weight or 1.0,
        "undesirable_weight": settings.train.undesirable_weight or 1.0,
        "max_length": None,  # cut already
    }
    return train_on_trl(
        "kto",
        given,
        arguments=arguments,
        data_collator=judged_batch(pad_id(given.tokenizer), given.train.examples),
    )


def score(model: nn.Module, tokenizer: Any, data: Preferences, settings: Sections) -> Evaluation:
    """Preference accuracy, of each good answer with each bad one, and reward margin."""
    beta = beta_of("kto", settings.train)
    return against_reference(model, tokenizer, data, settings, beta=beta)
