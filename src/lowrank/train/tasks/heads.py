"""What tasks share whose model has a head of its own: training it, with a loss that adds up over batches."""

from typing import Any

from lowrank.train.data.batches import collate_padded
from lowrank.train.data.encode import pad_id
from lowrank.train.run.trainer import Training
from lowrank.train.tasks.given import Given


def fit_head(given: Given, *, total: Any, **options: Any) -> Training:
    """`trainer.fit` on padded batches. total: (outputs, labels) → the summed loss, and over how many items."""
    from lowrank.train.run.callbacks import Loss

    padded = {"data_collator": collate_padded(padded_with(given.model, given.tokenizer))}
    return given.fit(
        compute_loss_func=Loss(given.evaluation, total),
        arguments={"label_names": ["labels"]},
        **{**padded, **options},
    )


def padded_with(model: Any, tokenizer: Any) -> int:
    """The id to fill up with; a causal model is told, since it looks for the last token that is another."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = pad_id(tokenizer)
    return config.pad_token_id
