"""Direct preference optimisation (Rafailov et al. 2023) of pairs of answers, and its relatives."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lowrank.train.data.encode import pad_id
from lowrank.train.data.shapes import Preference
from lowrank.train.evaluate import Evaluation
from lowrank.train.run.trainer import Training
from lowrank.train.settings import Sections
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.on_trl import LOSSES, beta_of, check_settings, train_on_trl
from lowrank.train.tasks.preference import (
    Preferences,
    against_reference,
    encode_preferences,
    pair_batch,
)


def prepare(
    rows: Sequence[Preference],
    tokenizer: Any,
    settings: Sections,
    *,
    max_length: int,
    like: dict[str, Any] | None = None,
) -> Preferences:
    """Raises TaskSettingsError for settings that DPO cannot honour."""
    check_settings("dpo", settings)
    template = settings.data.chat_template
    return encode_preferences(rows, tokenizer, max_length=max_length, chat_template=template)


def train(given: Given) -> Training:
    """Train what is trainable in the model, in place; its reference is the model with its adapters off."""
    settings = given.settings
    arguments = {
        "beta": beta_of("dpo", settings.train),
        "loss_type": [settings.train.loss_type or LOSSES["dpo"][0]],
        "label_smoothing": settings.train.label_smoothing or 0.0,
        "max_length": None,  # cut already
    }
    return train_on_trl(
        "dpo",
        given,
        arguments=arguments,
        data_collator=pair_batch(pad_id(given.tokenizer)),
    )


def score(model: nn.Module, tokenizer: Any, data: Preferences, settings: Sections) -> Evaluation:
    """Preference accuracy and reward margin, against the model with its adapters off."""
    beta = beta_of("dpo", settings.train)
    return against_reference(model, tokenizer, data, settings, beta=beta)
