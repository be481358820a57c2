"""Preferences as tokens, and rewards: each number again in float64, from the model's own logits."""

import math

import pytest
import text
import tiny
import torch

from lowrank import LoraConfig, get_peft_model
from lowrank.train.data.encode import IGNORE
from lowrank.train.data.problems import DataError
from lowrank.train.data.shapes import Judged, Preference
from lowrank.train.tasks.preference import (
    answer_logps,
    encode_preferences,
    implicit_rewards,
    judged_batch,
    pair_batch,
    scored_rewards,
)

TOKENIZER = text.byte_tokenizer()
PAIRS = [
    Preference(p["prompt"], p["completion"] * (1 + i % 3), "no" * (1 + i % 2), f"f:{i}")
    for i, p in enumerate(text.pairs(7))
]
JUDGED = [
    Judged(p["prompt"], p["completion"] * (1 + i % 3), i % 3 == 0, f"f:{i}")
    for i, p in enumerate(text.pairs(8))
]
ENDED = 2  # <|end|>, the tokenizer's end token


def model_with(std=0.3, **options):
    torch.manual_seed(2)
    model = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32, **options)
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=std)
    return model


def logp(model, example):
    """log π(answer | prompt), one row at a time and in float64."""
    ids, labels = torch.tensor([example["input_ids"]]), example["labels"]
    with torch.no_grad():
        table = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    return sum(
        float(table[i - 1, label]) for i, label in enumerate(labels) if label != IGNORE and i
    )


def test_answers_stand_after_their_prompt_and_end():
    data = encode_preferences(PAIRS, TOKENIZER, max_length=64)
    for example, row in zip(data.examples, data.rows, strict=True):
        for name in ("chosen", "rejected"):
            ids, labels = example[name]["input_ids"], example[name]["labels"]
            start = next(i for i, label in enumerate(labels) if label != IGNORE)
            assert TOKENIZER.decode(ids[start:]) == f"{getattr(row, name)}<|end|>"
            assert labels[start:] == ids[start:]
            assert labels[-1] == ENDED
            assert TOKENIZER.decode(ids[:start]).endswith(f"{row.prompt}<|end|>\n<|assistant|>")
    assert (data.truncated, data.dropped) == (0, 0)
    assert data.summary.startswith("7 pairs, ")


def test_only_the_assistants_turns_of_an_answer_are_compared():
    said = [
        {"role": "assistant", "content": "which?"},
        {"role": "user", "content": "this"},
        {"role": "assistant", "content": "so"},
    ]
    row = Preference("a", said, [{"role": "assistant", "content": "no"}], "f:1")
    chosen = encode_preferences([row], TOKENIZER, max_length=99).examples[0]["chosen"]
    learnt = [
        t for t, label in zip(chosen["input_ids"], chosen["labels"], strict=True) if label >= 0
    ]
    assert TOKENIZER.decode(learnt) == "which?<|end|>so<|end|>"


def test_what_lies_beyond_max_length_is_cut_or_dropped():
    long = Preference("x" * 80, "yes", "no", "f:1")
    alike = Preference("ask", "the same beginning, good", "the same beginning, bad", "f:2")
    cut = Preference("ask", "a" * 80, "b" * 80, "f:3")
    data = encode_preferences([long, alike, cut, *PAIRS], TOKENIZER, max_length=32)
    assert [row.where for row in data.rows] == ["f:3", *(row.where for row in PAIRS)]
    assert (data.dropped, data.truncated, data.longest) == (2, 1, 32)
    with pytest.raises(DataError, match="none of the 2 rows has a token"):
        encode_preferences([long, alike], TOKENIZER, max_length=32)


def test_batches_of_pairs_and_of_judged_answers():
    data = encode_preferences(PAIRS, TOKENIZER, max_length=64)
    batch = pair_batch(TOKENIZER.pad_token_id)(data.examples[:3])
    assert batch["input_ids"].shape[0] == 6
    for row, answer in enumerate([e["chosen"] for e in data.examples[:3]]):
        n = len(answer["input_ids"])
        assert batch["input_ids"][row, :n].tolist() == answer["input_ids"]
        assert batch["attention_mask"][row].sum() == n
        assert (batch["completion_mask"][row, :n] == 1).tolist() == [
            label != IGNORE for label in answer["labels"]
        ]
    judged = encode_preferences(JUDGED, TOKENIZER, max_length=64)
    assert judged.summary.startswith("8 answers (3 good), ")
    collate = judged_batch(TOKENIZER.pad_token_id, judged.examples)
    mixed = collate(judged.examples[:3])
    assert mixed["label"].tolist() == [True, False, False]
    said = [
        TOKENIZER.decode(ids[mask.bool()])
        for ids, mask in zip(mixed["KL_input_ids"], mixed["KL_completion_mask"], strict=True)
    ]
    assert said == [f"{JUDGED[i].completion}<|end|>" for i in (2, 0, 1)]
    asked = [TOKENIZER.decode(ids).split("<|end|>")[0] for ids in mixed["KL_input_ids"]]
    assert [a.removeprefix("<|user|>") for a in asked] == [row.prompt for row in JUDGED[:3]]
    alone = collate(judged.examples[:1])  # the last batch of an epoch may hold one row
    assert alone["KL_input_ids"][0].tolist() != alone["input_ids"][0].tolist()


def test_rewards_are_log_ratios_to_the_base_with_the_adapter_off():
    model, data = model_with(), encode_preferences(PAIRS, TOKENIZER, max_length=64)
    base = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32)
    with model.disable_adapter():
        for answer, other in zip(
            data.answers, answer_logps(model, data.answers, 0, 3), strict=True
        ):
            assert other == pytest.approx(logp(base, answer), rel=1e-5)
    expected = [0.3 * (logp(model, a) - logp(base, a)) for a in data.answers]
    found = implicit_rewards(model, data, 0, beta=0.3, batch_size=3)
    assert found.rewards == pytest.approx(expected, abs=1e-4)
    margins = [good - bad for good, bad in zip(expected[::2], expected[1::2], strict=True)]
    assert found.scores["reward_margin"] == pytest.approx(sum(margins) / 7, abs=1e-4)
    assert found.scores["preference_accuracy"] == sum(m > 0 for m in margins) / 7
    chosen = [e["chosen"] for e in data.examples]
    tokens = sum(label != IGNORE for a in chosen for label in a["labels"])
    loss = -sum(logp(model, a) for a in chosen) / tokens
    assert found.scores["chosen_loss"] == pytest.approx(loss, rel=1e-5)


def test_without_an_adapter_every_reward_is_a_tie():
    base = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32)
    data = encode_preferences(PAIRS, TOKENIZER, max_length=64)
    found = implicit_rewards(base, data, 0).scores
    assert (found["preference_accuracy"], found["reward_margin"]) == (0.5, 0.0)


def test_judged_answers_are_compared_each_with_each():
    model, data = model_with(), encode_preferences(JUDGED, TOKENIZER, max_length=64)
    found = implicit_rewards(model, data, 0, batch_size=5)
    good = [r for r, row in zip(found.rewards, JUDGED, strict=True) if row.label]
    bad = [r for r, row in zip(found.rewards, JUDGED, strict=True) if not row.label]
    wins = [float(g > b) for g in good for b in bad]
    assert found.scores["preference_accuracy"] == pytest.approx(sum(wins) / len(wins))
    margin = math.fsum(good) / len(good) - math.fsum(bad) / len(bad)
    assert found.scores["reward_margin"] == pytest.approx(margin)
    lone = encode_preferences([row for row in JUDGED if row.label], TOKENIZER, max_length=64)
    assert set(implicit_rewards(model, lone, 0).scores) == {"chosen_loss"}


def test_a_reward_models_scores_do_not_depend_on_padding():
    data = encode_preferences(PAIRS, TOKENIZER, max_length=64)
    model = tiny.llama_classifier(torch.float32, vocab=text.VOCABULARY, num_labels=1)
    expected = []
    for answer in data.answers:
        with torch.no_grad():
            expected.append(float(model(input_ids=torch.tensor([answer["input_ids"]])).logits))
    found = scored_rewards(model, data, TOKENIZER.pad_token_id, batch_size=4)
    assert found.rewards == pytest.approx(expected, abs=1e-5)
    assert "chosen_loss" not in found.scores
