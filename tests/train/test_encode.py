import pytest
import text

from lowrank.train.encode import IGNORE, encode, pad_right, prompt_ids, prompt_text
from lowrank.train.rows import DataError, Row

TALK = Row([{"role": "user", "content": "two?"}], "yes", "f:1")
PAIR = Row("two?", "yes", "f:2")
TEXT = Row(None, "all of it", "f:3")


@pytest.fixture(scope="module")
def tokenizer():
    return text.byte_tokenizer()


def learnt(encoded, tokenizer, i=0):
    """The supervised part of an example, as text."""
    return tokenizer.decode([label for label in encoded.examples[i]["labels"] if label != IGNORE])


@pytest.mark.parametrize(
    ("row", "options", "whole", "supervised"),
    [
        (TALK, {}, "<|user|>two?<|end|>\n<|assistant|>yes<|end|>", "yes<|end|>"),
        (PAIR, {}, "<|user|>two?<|end|>\n<|assistant|>yes<|end|>", "yes<|end|>"),
        (PAIR, {"chat_template": False}, "two?yes<|end|>", "yes<|end|>"),
        (PAIR, {"chat_template": False, "loss_on": "all"}, "two?yes<|end|>", "two?yes<|end|>"),
        (TEXT, {}, "all of it<|end|>", "all of it<|end|>"),
    ],
)
def test_what_is_read_and_what_is_learnt(tokenizer, row, options, whole, supervised):
    encoded = encode([row], tokenizer, max_length=100, **options)
    assert tokenizer.decode(encoded.examples[0]["input_ids"]) == whole
    assert learnt(encoded, tokenizer) == supervised


def test_an_end_inside_the_prompt_is_not_learnt_and_the_last_one_is(tokenizer):
    """By position: the same token is masked in the prompt, and supervised after the answer."""
    eos = tokenizer.eos_token_id
    talk = [{"role": r, "content": "a"} for r in ("system", "user", "assistant", "user")]
    example = encode([Row(talk, "b", "f:1")], tokenizer, max_length=100).examples[0]
    ends = [i for i, token in enumerate(example["input_ids"]) if token == eos]
    assert len(ends) == 5
    assert [example["labels"][i] for i in ends] == [IGNORE] * 4 + [eos]


def test_pad_equal_to_eos_does_not_unlearn_eos():
    tokenizer = text.byte_tokenizer(pad="<|end|>")
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    encoded = encode([PAIR, Row("a", "longer answer", "f:2")], tokenizer, max_length=100)
    batch = pad_right(eos)(encoded.examples)
    n = len(encoded.examples[0]["input_ids"])
    assert batch["labels"][0, n - 1] == eos  # the end of the answer is learnt …
    assert (batch["labels"][0, n:] == IGNORE).all()  # … and the same id as padding is not
    assert (batch["input_ids"][0, n:] == eos).all()
    assert batch["attention_mask"].sum(1).tolist() == [
        len(e["input_ids"]) for e in encoded.examples
    ]


def test_what_is_cut_and_what_is_dropped_is_counted(tokenizer):
    rows = [
        Row("a", "b", "f:1"),  # 2 tokens and the end
        Row("a", "b" * 50, "f:2"),  # keeps a part of its answer
        Row("a" * 50, "b", "f:3"),  # keeps nothing of it
    ]
    encoded = encode(rows, tokenizer, max_length=10, chat_template=False)
    assert (encoded.truncated, encoded.dropped, encoded.longest) == (1, 1, 10)
    assert [row.where for row in encoded.rows] == ["f:1", "f:2"]
    assert encoded.tokens == 3 + 10
    assert encoded.supervised == 2 + 9
    assert encoded.summary == (
        "2 rows, 13 tokens (85% supervised), longest 10, truncated 1, dropped 1"
    )


def test_nothing_left_to_learn_is_an_error(tokenizer):
    with pytest.raises(DataError, match="none of the 1 rows has a token of its answer"):
        encode([Row("a" * 50, "b", "f:1")], tokenizer, max_length=10, chat_template=False)


def test_a_single_token_teaches_nothing(tokenizer):
    """Nothing predicts the first token of a text."""
    with pytest.raises(DataError):
        encode([Row(None, "a", "f:1")], tokenizer, max_length=1)


def test_training_sees_the_prompt_as_generation_gives_it(tokenizer):
    ids = prompt_ids([prompt_text("two?", tokenizer)], tokenizer, templated=True)[0]
    example = encode([PAIR], tokenizer, max_length=100).examples[0]
    assert example["input_ids"][: len(ids)] == ids
    assert all(label == IGNORE for label in example["labels"][: len(ids)])
    assert IGNORE not in example["labels"][len(ids) :]


def test_messages_need_a_template():
    plain = text.byte_tokenizer(template=None)
    with pytest.raises(DataError, match="this tokenizer has none"):
        encode([TALK], plain, max_length=100)
    assert encode([PAIR], plain, max_length=100).supervised == 4


def test_a_template_that_renders_the_prompt_anew_does_not_move_the_mask():
    """Some templates drop earlier turns' thinking once an answer follows."""
    odd = text.byte_tokenizer(
        template="{% if add_generation_prompt %}{{ messages[-1].content }}:"
        "{% else %}other {{ messages[-1].content }}{% endif %}"
    )
    encoded = encode([TALK], odd, max_length=100)
    assert odd.decode(encoded.examples[0]["input_ids"]) == "two?:yes<|end|>"
    assert learnt(encoded, odd) == "yes<|end|>"
