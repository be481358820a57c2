"""What tasks share whose model has a head of its own: training it, with a loss that adds up over batches."""

from pathlib import Path
from typing import Any

from torch import nn

from lowrank.train.data.batches import collate_padded
from lowrank.train.data.encode import Encoded, pad_id
from lowrank.train.run.trainer import Training, fit
from lowrank.train.settings import Sections


def fit_head(
    model: nn.Module,
    tokenizer: Any,
    train: Encoded,
    evaluation: Encoded | None,
    output_dir: str | Path,
    settings: Sections,
    *,
    total: Any,
    **options: Any,
) -> Training:
    """`trainer.fit` on padded batches. total: (outputs, labels) → the summed loss, and over how many items."""
    from lowrank.train.run.callbacks import Loss

    given = {"data_collator": collate_padded(padded_with(model, tokenizer)), **options}
    return fit(
        model,
        train.examples,
        evaluation.examples if evaluation else None,
        output_dir,
        settings.train,
        settings.eval,
        tokens=train.tokens,
        places=[row.where for row in train.rows],
        compute_loss_func=Loss(evaluation, total),
        arguments={"label_names": ["labels"]},
        **given,
    )


def padded_with(model: Any, tokenizer: Any) -> int:
    """The id to fill up with; a causal model is told, since it looks for the last token that is another."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = pad_id(tokenizer)
    return config.pad_token_id
