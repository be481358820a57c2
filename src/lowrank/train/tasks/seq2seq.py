"""Encoder-decoder models (T5, BART): the prompt is read by the encoder, the answer learnt by the decoder."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowrank.train.data.batches import Example, collate_padded, totalled
from lowrank.train.data.encode import IGNORE, Encoded, pad_id
from lowrank.train.data.problems import DataError
from lowrank.train.data.render import prompt_text
from lowrank.train.data.shapes import Row
from lowrank.train.evaluate import (
    Evaluation,
    answered,
    device_of,
    of_each,
    perplexity,
    sampling_of,
    spread,
)
from lowrank.train.run.trainer import Training
from lowrank.train.settings import Sections
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.heads import fit_head


def prepare(
    rows: Sequence[Row],
    tokenizer: Any,
    settings: Sections,
    *,
    max_length: int,
    like: Mapping[str, Any] | None = None,
) -> Encoded:
    """Prompts for the encoder, and answers, closed by the end token, for the decoder; both cut at their end.

    Prompts at `max_length` tokens, answers at data.max_target_length. Raises DataError for rows of text alone.
    """
    alone = [row.where for row in rows if row.prompt is None]
    if alone:
        raise DataError(
            f"{len(alone)} rows have no prompt, the first: {alone[0]}; an encoder needs one.\n"
            "Give `prompt` and `completion`, or `dialogue` and `summary`."
        )
    longest = settings.data.max_target_length or max_length
    asked = [_prompt(row, tokenizer, settings) for row in rows]
    prompts = tokenizer(asked, verbose=False)["input_ids"]
    answers = tokenizer(text_target=[row.answer for row in rows], verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    examples, truncated = [], 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if eos is not None and answer[-1:] != [eos]:
            answer = [*answer, eos]
        truncated += len(prompt) > max_length or len(answer) > longest
        if len(prompt) > max_length:  # the token that closes every text stays
            prompt = [
                *prompt[: max_length - 1],
                prompt[-1] if prompt[-1] == eos else prompt[max_length - 1],
            ]
        examples.append({"input_ids": prompt, "labels": answer[:longest]})
    supervised = sum(len(e["labels"]) for e in examples)
    return Encoded(
        examples=examples,
        rows=list(rows),
        tokens=sum(len(e["input_ids"]) for e in examples) + supervised,
        supervised=supervised,
        longest=max(max(len(e["input_ids"]), len(e["labels"])) for e in examples),
        truncated=truncated,
        dropped=0,
        max_length=max_length,
        learnt=[row.answer for row in rows],
    )


def _prompt(row: Row, tokenizer: Any, settings: Sections) -> str:
    return prompt_text(row.prompt, tokenizer, settings.data.chat_template, row.tools)


def total(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels (rows, tokens): what the decoder says at each place."""
    said = labels != IGNORE
    return cross_entropy(outputs.logits[said].float(), labels[said], reduction="sum"), said.sum()


def collate(model: Any, tokenizer: Any) -> Any:
    """A collator that also has what the decoder is given: its start token, and the answer but for its last."""
    padded, pad = collate_padded(pad_id(tokenizer)), pad_id(tokenizer)
    start = model.config.decoder_start_token_id
    if start is None:
        start = pad

    def batch(examples: Sequence[Example]) -> dict[str, Tensor]:
        made = padded(examples)
        labels = made["labels"]
        given = labels.roll(1, dims=1).masked_fill(labels.roll(1, dims=1) == IGNORE, pad)
        given[:, 0] = start
        return {**made, "decoder_input_ids": given}

    return batch


def train(given: Given) -> Training:
    return fit_head(given, total=total, data_collator=collate(given.model, given.tokenizer))


def score(model: nn.Module, tokenizer: Any, data: Encoded, settings: Sections) -> Evaluation:
    """ROUGE and the like of generated answers, loss and perplexity."""
    size = settings.eval.batch_size

    def read(chosen: Sequence[int], out: Any, labels: Tensor) -> tuple[float, Sequence[int]]:
        return float(total(out, labels)[0]), chosen

    nats, _ = totalled(read, model, data.examples, collate(model, tokenizer), size)
    asked = spread(data.examples, settings.eval.generate)

    def said(**sampling: Any) -> list[str]:
        ids = [example["input_ids"] for example in asked]
        return generated(model, tokenizer, ids, size, settings.eval.max_new_tokens, **sampling)

    rows = spread(data.rows, settings.eval.generate)
    scores, answers = answered(
        rows, said, settings.eval.metrics or ROUGE, sampling_of(settings.eval)
    )
    loss = nats / data.supervised
    return Evaluation(
        scores={**scores, "loss": loss, "perplexity": perplexity(loss)},
        rows=len(data.rows),
        tokens=data.supervised,
        answered=len(answers),
        answers=answers,
    )


ROUGE = ("rouge_l", "rouge_1", "rouge_2", "exact_match")


def generated(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
    **sampling: Any,
) -> list[str]:
    """What the decoder says to each prompt, in their order."""
    padded, device = collate_padded(pad_id(tokenizer)), device_of(model)

    def said(chosen: Sequence[int]) -> list[str]:
        inputs = padded([{"input_ids": prompts[i]} for i in chosen])
        out = model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_id(tokenizer),
            **sampling,
        )
        return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]

    drawn = bool(sampling.get("do_sample"))
    return of_each(said, list(map(len, prompts)), batch_size, model, divide=not drawn)
