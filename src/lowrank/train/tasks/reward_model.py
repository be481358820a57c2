"""Reward models: a score for an answer, learnt from pairs (Ouyang et al. 2022, eq. 1)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from lowrank.train.data.encode import pad_id
from lowrank.train.data.shapes import Preference
from lowrank.train.evaluate import Evaluation
from lowrank.train.run.trainer import Training
from lowrank.train.settings import Sections
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.on_trl import check_settings, train_on_trl
from lowrank.train.tasks.preference import (
    Preferences,
    encode_preferences,
    pair_batch,
    scored_rewards,
)


def prepare(
    rows: Sequence[Preference],
    tokenizer: Any,
    settings: Sections,
    *,
    max_length: int,
    like: dict[str, Any] | None = None,
) -> Preferences:
    """Raises TaskSettingsError for settings that reward models cannot honour."""
    check_settings("reward", settings)
    template = settings.data.chat_template
    found = encode_preferences(rows, tokenizer, max_length=max_length, chat_template=template)
    options = {"num_labels": 1, "pad_token_id": pad_id(tokenizer)}
    return dataclasses.replace(found, model_options=options)


def train(given: Given) -> Training:
    """Train what is trainable in the model, whose one output is the score of the last token, in place."""
    collate = pair_batch(pad_id(given.tokenizer))

    def batch(examples: list[dict[str, Any]]) -> dict[str, Any]:
        found = collate(examples)
        del found["completion_mask"]
        return found

    return train_on_trl(
        "reward",
        given,
        arguments={"max_length": None},  # cut already
        data_collator=batch,
    )


def score(model: nn.Module, tokenizer: Any, data: Preferences, settings: Sections) -> Evaluation:
    """Preference accuracy and reward margin; a reward model writes no answers."""
    rewards = scored_rewards(model, data, pad_id(tokenizer), batch_size=settings.eval.batch_size)
    return Evaluation(rewards.scores, len(data.rows), data.supervised, 0, [])
