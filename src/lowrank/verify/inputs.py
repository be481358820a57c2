"""What a comparison is run on: given texts or token ids, or a seeded mixture made for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.errors import ModelFolderError
from lowrank.model_files import has_tokenizer
from lowrank.model_folder import quiet

Example = Mapping[str, Any]  # "input_ids" (tokens,), and "labels" (tokens,) where a loss is wanted
TEXTS = (
    "The old lighthouse keeper wrote down the weather every morning.",
    "Question: What is 17 + 25?\nAnswer: 42",
    "name: Aromi | food: Italian | price: cheap | area: riverside",
    "Once upon a time there was a little fox who wanted to see the sea.",
    'def area(width, height):\n    """The area of a rectangle."""\n    return width * height',
    "My card has not arrived yet. How long does it usually take?",
)
MAX_TOKENS = 256  # of one example
MAX_VALUES = 2**26  # outputs held at a time, of each of two models: 256 MiB in float32


class Inputs(NamedTuple):
    """Examples without padding, each of batch size one, and where they come from in words."""

    examples: list[dict[str, Tensor]]  # what the models are called with
    labels: list[Tensor | None]  # (1, tokens), -100 where no loss is taken; None: no labels
    source: str


def inputs_for(
    model: Any,
    task: str,
    sources: Sequence[str | Path],
    revision: str | None,
    given: Sequence[str | Example] | None,
    seed: int = 0,
    rows: Sequence[int] = (),
) -> Inputs:
    """`given_inputs`, or where nothing is given `generated_inputs`, with the tokenizer of the first source that has one."""
    from transformers import AutoTokenizer

    tokenizer = None
    for source, at in zip(sources, (None, revision), strict=True):
        if has_tokenizer(source, at):
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(str(source), revision=at)
            break
    if given is None:
        return generated_inputs(model, task, tokenizer, seed=seed, rows=rows)
    return given_inputs(
        given, task, tokenizer, getattr(model.config.get_text_config(), "vocab_size", 1)
    )


def given_inputs(given: Sequence[str | Example], task: str, tokenizer: Any, values: int) -> Inputs:
    """The examples of the caller: texts, or mappings with `input_ids` and, for a perplexity, `labels`.

    values: output numbers a position (the vocabulary's size); as many examples are taken as fit into
    MAX_VALUES. For a causal model a text is its own label.
    """
    examples: list[dict[str, Tensor]] = []
    labels: list[Tensor | None] = []
    budget = MAX_VALUES // max(values, 1)
    for one in given:
        example, label = _one(one, task, tokenizer)
        budget -= max(tensor.numel() for tensor in example.values())
        if examples and budget < 0:
            break
        examples.append(example)
        labels.append(label)
    if not examples:
        raise ModelFolderError("No examples were given to compare on: the data is empty.")
    kind = "texts" if isinstance(given[0], str) else "examples"
    some = (
        f"the first {len(examples)} of {len(given)}"
        if len(examples) < len(given)
        else f"{len(examples)}"
    )
    return Inputs(examples, labels, f"{some} {kind} given")


def _one(one: str | Example, task: str, tokenizer: Any) -> tuple[dict[str, Tensor], Tensor | None]:
    if isinstance(one, str):
        if tokenizer is None:
            raise ModelFolderError(
                "Texts were given to compare on, but neither adapter nor base has a tokenizer."
            )
        ids = _row(tokenizer(one, truncation=True, max_length=MAX_TOKENS)["input_ids"])
        one = {"input_ids": ids, "labels": ids if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else None}
    label = one.get("labels")
    example = {
        name: value if isinstance(value, Tensor) and value.is_floating_point() else _row(value)
        for name, value in one.items()
        if name != "labels" and value is not None
    }
    if label is None or task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return example, None
    label = _row(label)
    if task == "SEQ_2_SEQ_LM" and "decoder_input_ids" not in example:
        example["labels"] = label  # the model makes the decoder's input from them
    return example, label


def _row(ids: Any) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.long).reshape(1, -1)[:, :MAX_TOKENS]


def generated_inputs(
    model: Any, task: str, tokenizer: Any, *, seed: int = 0, rows: Sequence[int] = ()
) -> Inputs:
    """Texts (where there is a tokenizer) and random token ids, the same for the same seed.

    rows: token ids that have to occur, such as the embedding's rows that the adapter changes most.
    Raises ModelFolderError for a model that reads something else than token ids or images.
    """
    generator = torch.Generator().manual_seed(seed)
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        config = getattr(model.config, "vision_config", model.config)
        shape = (1, config.num_channels, config.image_size, config.image_size)
        images = [{name: torch.rand(shape, generator=generator)} for _ in range(4)]
        return Inputs(images, [None] * 4, f"4 random images (seed {seed})")
    if name != "input_ids":
        raise ModelFolderError(
            f"{type(model).__name__} reads {name!r}, for which no inputs can be made up. Give inputs."
        )
    size = model.get_input_embeddings().weight.shape[0]
    length = min(48, getattr(model.config, "max_position_embeddings", None) or 48)
    examples = (
        [_row(tokenizer(text)["input_ids"])[:, :length] for text in TEXTS] if tokenizer else []
    )
    texts = len(examples)
    while len(examples) < max(8, texts + 2):
        examples.append(torch.randint(size, (1, length), generator=generator))
    if rows:
        examples += [
            _row(list(rows)[i : i + length]) for i in range(0, min(len(rows), 2 * length), length)
        ]
    examples = [ids for ids in examples if ids.numel()]
    inputs = [{"input_ids": ids} for ids in examples]
    if task == "SEQ_2_SEQ_LM":
        for i, one in enumerate(inputs):
            one["decoder_input_ids"] = examples[i - 1][:, : length // 2]
    words = f"{texts} texts and {len(inputs) - texts} rows of token ids (seed {seed})"
    return Inputs(inputs, [None] * len(inputs), words)
