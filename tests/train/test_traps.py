"""What users of training tools report as having gone wrong without a word, each as a test.

Elsewhere: pad equal to eos unlearning eos, and nothing left to learn (test_encode); an adapter loaded frozen, and a
Trainer that does not know it (test_sft); adapters saved empty by several processes (test_processes); rows that see each
other when packed (test_packing); half a checkpoint (test_checkpoints, test_killed).
"""

import dataclasses
import math

import pytest
import text
import tiny
import torch
from training import FAST, ROWS, adapted, fit

from lowrank.errors import LowrankWarning
from lowrank.train.data.encode import IGNORE, encode
from lowrank.train.data.rows import DataError, Row
from lowrank.train.run.divergence import (
    GRADIENT_STEPS,
    DivergedError,
    GradientWatch,
    LossWatch,
    rows_words,
)

TOKENIZER = text.byte_tokenizer()
EOS = 2


@pytest.mark.parametrize("chat_template", [True, False])
def test_the_end_of_an_answer_is_learnt(chat_template):
    data = encode(ROWS, TOKENIZER, max_length=64, chat_template=chat_template)
    for example in data.examples:
        learnt = [token for token in example["labels"] if token != IGNORE]
        assert EOS in learnt[-2:]  # the template ends its turns with a line feed
        assert learnt.count(EOS) == 1


def test_a_prompt_longer_than_max_length_is_no_row_and_counts():
    rows = [Row("long " * 30, "a", "f:1"), Row("short", "b", "f:2")]
    data = encode(rows, TOKENIZER, max_length=40)
    assert [row.where for row in data.rows] == ["f:2"]
    assert data.dropped == 1
    with pytest.raises(DataError):
        encode(rows[:1], TOKENIZER, max_length=40)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_leaves_every_adapter_its_gradient(reentrant):
    """The inputs of a frozen base need no gradient: a checkpoint that asks for one there has none to give."""
    ids = tiny.IDS

    def gradients(checkpointed):
        model = tiny.randomise(adapted())
        if checkpointed:
            options = {"use_reentrant": reentrant}
            if hasattr(model, "activation_checkpointing_enable"):
                model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
            else:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == 2 * 7 * 2
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


def test_layers_that_get_no_gradient_are_named(tmp_path):
    model = adapted(layers=1)
    layer = model.get_base_model().model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x).detach()  # as a kernel without a backward would
    data = encode(ROWS, TOKENIZER, max_length=64), None
    # a warning, which the tests make an error
    with pytest.raises(LowrankWarning, match=r"^6 trainable parameters had no gradient[\s\S]*mlp"):
        fit(model, TOKENIZER, data, tmp_path, dataclasses.replace(FAST, epochs=1))


def test_b_gets_a_gradient_at_once_and_a_after_it():
    model = adapted(layers=1)
    watch, optimizer = GradientWatch(model), torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(GRADIENT_STEPS):
        model(input_ids=tiny.IDS, labels=tiny.IDS).loss.backward()
        assert watch.problem() is None
        optimizer.step()
        optimizer.zero_grad()
    assert watch.without == []


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([2.0] * 5 + [4.9] * 20, None),  # below twice the start and one more
        ([2.0] * 5 + [5.1] * 20, 12),
        ([2.0] * 5 + [5.1, 5.1, 2.0] * 9, None),  # comes back each time
        ([0.01] * 5 + [0.9] * 20, None),  # a small loss may double many times
        ([-0.2, 0.3, -0.1, 0.2, 0.1] * 6, None),  # GRPO's, about 0
        ([2.0, math.inf], 1),
        ([math.nan], 0),
    ],
)
def test_when_a_loss_has_left_its_start(losses, stops):
    watch = LossWatch(patience=8)
    found = [i for i, loss in enumerate(losses) if watch.problem(loss)]
    assert (found or [None])[0] == stops
    never = LossWatch(patience=None)
    assert not [loss for loss in losses if math.isfinite(loss) and never.problem(loss)]


def test_a_loss_that_left_its_start_stops_with_the_rows_and_what_to_try(tmp_path):
    settings = dataclasses.replace(FAST, epochs=3, divergence_steps=6)
    model, calls = adapted(layers=1), []

    def wild(module, inputs, output):
        calls.append(1)
        return output * (1000 if len(calls) > 7 else 1)

    model.get_base_model().model.norm.register_forward_hook(wild)
    data = encode(ROWS, TOKENIZER, max_length=64), None
    with pytest.raises(DivergedError) as caught:
        fit(model, TOKENIZER, data, tmp_path, settings)
    message = str(caught.value)
    assert "for 6 steps has been above" in message
    assert "it began at 5." in message
    assert "at step 13 of 18" in message
    assert "Its rows: f:" in message
    assert "lower train.learning_rate (now 0.01)" in message


def test_a_gradient_that_is_not_finite_stops_before_the_weights(tmp_path):
    """The loss is finite: only what comes back is not."""
    model = adapted(layers=1)
    norm = model.get_base_model().model.norm
    norm.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * math.inf,))
    data = encode(ROWS, TOKENIZER, max_length=64), None
    with pytest.raises(DivergedError, match=r"the gradient's norm is nan at step 1 of"):
        fit(model, TOKENIZER, data, tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_places_in_words():
    places = [f"f:{i}" for i in range(10)]
    assert rows_words(places[:2]) == "f:0, f:1"
    assert rows_words(places) == ", ".join(places[:8]) + " and 2 more"
