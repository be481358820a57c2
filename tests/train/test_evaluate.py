import math

import pytest
import text
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank.train.answers import exact_match, longest_common_subsequence, rouge_l
from lowrank.train.data.encode import IGNORE, encode, prompt_ids
from lowrank.train.data.rows import Row
from lowrank.train.evaluate import (
    answer_rows,
    evaluate,
    generate_batch,
    mean_loss,
    spread,
    summed_loss,
)

ROWS = [Row(f"say {'x' * n}", "abc" * n, f"f:{n}") for n in (1, 7, 2, 5, 3)]


@pytest.fixture(scope="module")
def tokenizer():
    return text.byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32)


def loss_by_hand(model, examples):
    """Nats and tokens, a row at a time without padding, in float64 from the logits."""
    nats, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        logits = model(input_ids=ids).logits[0].double()
        for position in range(1, ids.shape[1]):
            if example["labels"][position] != IGNORE:
                row = logits[position - 1]
                nats += float(torch.logsumexp(row, 0) - row[ids[0, position]])
                tokens += 1
    return nats, tokens


@torch.no_grad()
def test_loss_is_the_mean_over_all_supervised_tokens(model, tokenizer):
    data = encode(ROWS, tokenizer, max_length=100)
    nats, tokens = loss_by_hand(model, data.examples)
    for batch_size in (1, 2, 5):  # rows of other lengths beside it change nothing
        loss, counted = mean_loss(model, data.examples, 0, batch_size)
        assert counted == tokens == data.supervised
        assert loss == pytest.approx(nats / tokens, rel=1e-5)
    result = evaluate(model, tokenizer, data)
    assert result.scores["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


@given(st.lists(st.integers(), unique=True), st.integers(0, 30))
def test_spread_keeps_the_order_and_takes_even_distances(items, count):
    found = spread(items, count)
    assert len(found) == min(count, len(items))
    places = [items.index(item) for item in found]
    distances = (
        [b - a for a, b in zip(places, [*places[1:], len(items)], strict=True)] if places else []
    )
    assert all(d >= 1 for d in distances)
    assert not distances or max(distances) - min(distances) <= 1
    assert places[:1] in ([], [0])


def test_answered_rows_of_a_sorted_file_are_of_every_kind(model, tokenizer):
    rows = [Row(f"say {kind}{n}", kind, f"f:{n}") for kind in "abcd" for n in range(5)]
    data = encode(rows, tokenizer, max_length=100)
    result = evaluate(model, tokenizer, data, generate=4, max_new_tokens=1)
    assert [answer.expected for answer in result.answers] == ["a", "b", "c", "d"]


def test_loss_ignores_what_is_not_supervised():
    logits = torch.randn(2, 5, 11, dtype=torch.float64)
    labels = torch.tensor([[IGNORE, IGNORE, 3, 4, IGNORE], [7, 1, IGNORE, IGNORE, 2]])
    expected = -sum(
        torch.log_softmax(logits[i, t - 1].float(), 0)[label]
        for i, t, label in [(0, 2, 3), (0, 3, 4), (1, 1, 1), (1, 4, 2)]
    )
    torch.testing.assert_close(summed_loss(logits, labels), expected)


@torch.no_grad()
def test_a_batch_answers_as_each_prompt_alone(model, tokenizer):
    """Left padding: each answer follows its own prompt."""
    answers = answer_rows(model, tokenizer, ROWS, max_new_tokens=6, batch_size=4)
    for row, answer in zip(ROWS, answers, strict=True):
        prompt = f"<|user|>{row.prompt}<|end|>\n<|assistant|>"
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        new = []
        for _ in range(6):  # greedy, without a cache
            token = (
                model(input_ids=torch.cat([ids, torch.tensor([new], dtype=int)], 1))
                .logits[0, -1]
                .argmax()
            )
            if token == tokenizer.eos_token_id:
                break
            new.append(int(token))
        assert answer == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_generation_keeps_the_training_mode_and_makes_no_graph(model, tokenizer):
    model.train()
    generate_batch(model, tokenizer, prompt_ids(["a"], tokenizer, True), 2)
    assert model.training
    model.eval()


def test_only_rows_with_a_prompt_are_answered(model, tokenizer):
    data = encode([Row(None, "text", "f:1"), *ROWS], tokenizer, max_length=100)
    result = evaluate(model, tokenizer, data, generate=2, max_new_tokens=3)
    assert (result.rows, result.answered) == (6, 2)
    assert next(iter(result.scores)) == "exact_match"
    assert result.over("rouge_l") == "answers to 2 evaluation rows"
    assert [answer.expected for answer in result.answers] == ["abc", "abc" * 2]
    nothing = evaluate(model, tokenizer, data, generate=0)
    assert list(nothing.scores) == ["loss", "perplexity"]
    assert nothing.answers == []


def test_other_metrics_and_samples_beside_the_greedy_answers(model, tokenizer):
    data = encode(ROWS, tokenizer, max_length=100)
    options = {"generate": 3, "max_new_tokens": 4, "metrics": ("squad_f1", "rouge_1")}
    state = torch.get_rng_state()
    plain = evaluate(model, tokenizer, data, **options)
    drawn = [
        evaluate(model, tokenizer, data, **options, sampling={"temperature": 5.0, "seed": seed})
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)  # training goes on as if nothing was drawn
    assert list(plain.scores) == ["squad_f1", "rouge_1", "loss", "perplexity"]
    assert set(drawn[0].scores) - set(plain.scores) == {"sampled_squad_f1", "sampled_rouge_1"}
    samples = [[answer.sampled for answer in one.answers] for one in drawn]
    assert samples[0] == samples[1] != samples[2]
    assert [a.answer for a in drawn[0].answers] == [a.answer for a in plain.answers]


def test_exact_match_forgives_only_white_space():
    assert exact_match(" track  a parcel\n", "track a parcel")
    assert not exact_match("Track a parcel", "track a parcel")
    assert not exact_match("", "track")


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        # Lin 2004, §3.1: "police kill the gunman" shares 2 words in order with the reference
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("The gunman, killed!", "the gunman killed", 1.0),
        ("a", "a b c", 2 * (1 * 1 / 3) / (1 + 1 / 3)),
        ("", "a", 0.0),
        ("Äpfel über", "äpfel", 2 / 3),
    ],
)
def test_rouge_l(answer, expected, f1):
    assert rouge_l(answer, expected) == pytest.approx(f1)


words = st.lists(st.sampled_from("abc"), max_size=7)


@given(words, words)
def test_longest_common_subsequence_against_all_subsequences(a, b):
    def subsequences(items):
        return {
            tuple(item for i, item in enumerate(items) if mask >> i & 1)
            for mask in range(2 ** len(items))
        }

    longest = max(len(s) for s in subsequences(a) & subsequences(b))
    assert longest_common_subsequence(a, b) == longest
