import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import text

from lowrank.errors import LowrankWarning
from lowrank.train.data.encode import IGNORE, encode, pad_right, prompt_ids, segments
from lowrank.train.data.render import prompt_text
from lowrank.train.data.rows import DataError, Row

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


# --- several turns --------------------------------------------------------------------------------


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


TURNS = [
    turn("system", "s"),
    turn("user", "a"),
    turn("assistant", "first"),
    turn("user", "b"),
    turn("assistant", "second"),
    turn("tool", "t"),
]
LONG = Row(TURNS, "third", "f:1")
# the same rendering as text.TEMPLATE, with the assistant's words marked; the end is outside of the marks
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# only the last answer has its thinking part, as in Qwen3's
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}"
    "<think></think>{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def supervised(row, tokenizer, loss_on="assistant"):
    """What is learnt of a row, part by part."""
    encoded = encode([row], tokenizer, max_length=500, loss_on=loss_on)
    return [text for text, learnt in segments(encoded.examples[0], tokenizer) if learnt]


@pytest.mark.parametrize("template", [text.TEMPLATE, MARKED], ids=["without marks", "with marks"])
@pytest.mark.parametrize(
    ("loss_on", "parts"),
    [
        ("assistant", ["first<|end|>", "second<|end|>", "third<|end|>"]),
        ("last", ["third<|end|>"]),
        ("completion", ["third<|end|>"]),
    ],
)
def test_the_turns_that_are_learnt(template, loss_on, parts):
    """Each with its end, and without the line break after it, by position."""
    tokenizer = text.byte_tokenizer(pad="<|end|>", template=template)
    assert supervised(LONG, tokenizer, loss_on) == parts
    example = encode([LONG], tokenizer, max_length=500, loss_on=loss_on).examples[0]
    assert tokenizer.decode(example["input_ids"]) == (
        "<|system|>s<|end|>\n<|user|>a<|end|>\n<|assistant|>first<|end|>\n<|user|>b<|end|>\n"
        "<|assistant|>second<|end|>\n<|tool|>t<|end|>\n<|assistant|>third<|end|>"
    )
    assert supervised(LONG, tokenizer, "all") == [tokenizer.decode(example["input_ids"])]


def test_a_completion_of_several_turns(tokenizer):
    """What the user or a tool says in between is never the model's to learn."""
    row = Row(TURNS[:2], "third", "f:1", [*TURNS[2:], turn("assistant", "third")])
    assert supervised(row, tokenizer, "completion") == [
        "first<|end|>",
        "second<|end|>",
        "third<|end|>",
    ]
    assert supervised(row, tokenizer, "last") == ["third<|end|>"]


def test_a_message_of_weight_0_is_not_learnt():
    turns = [turn("user", "a"), turn("assistant", "no", weight=0), turn("user", "b")]
    for template in (text.TEMPLATE, MARKED):
        tokenizer = text.byte_tokenizer(template=template)
        assert supervised(Row(turns, "yes", "f:1"), tokenizer) == ["yes<|end|>"]
        reply = [turn("assistant", "no", weight=0)]
        row = Row([*TURNS[:3], turn("user", "b")], "no", "f:1", reply)
        assert supervised(row, tokenizer) == ["first<|end|>"]


def test_tools_and_calls_reach_the_template():
    tokenizer = text.byte_tokenizer(
        template="{{ tools[0].function.name }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.a }})"
        "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "plus"}}]
    row = Row([turn("user", "q")], "", "f:1", [turn("assistant", "", tool_calls=[call])], tools)
    encoded = encode([row], tokenizer, max_length=100)
    assert segments(encoded.examples[0], tokenizer) == [
        ("plus<|user|>q<|end|>\n<|assistant|>", False),
        ("add(1)<|end|>", True),
    ]


def test_turns_that_change_once_more_follow_are_found_or_refused():
    tokenizer = text.byte_tokenizer(template=THINKING)
    assert supervised(LONG, tokenizer) == [
        "first<|end|>",
        "second<|end|>",
        "<think></think>third<|end|>",
    ]
    # a template that numbers the messages from the end: no beginning of it stays as it was
    odd = text.byte_tokenizer(
        template="{% for m in messages %}{{ loop.revindex }}{{ m.content }}<|end|>{% endfor %}"
    )
    with pytest.raises(DataError) as caught:
        encode([LONG, LONG._replace(where="f:2")], odd, max_length=100, loss_on="assistant")
    assert "f:1, 2: message 3 has no clear place" in str(caught.value)
    assert "Use data.loss_on: last, or a template with {% generation %} marks" in str(caught.value)


def test_a_template_that_refuses_rows_names_them_all():
    strict = text.byte_tokenizer(
        template="{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}"
        "{% endif %}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    )
    with pytest.raises(DataError, match="f:1, 1: the chat template refuses it: no system here"):
        encode([LONG, TALK._replace(where="f:9"), LONG], strict, max_length=100)


def test_an_end_token_of_another_name_is_learnt_too():
    """A turn ends in <|system|> here, and eos comes after it: both are learnt, in each turn its own end."""
    for body in ("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"):
        odd = text.byte_tokenizer(
            template="{% for m in messages %}{% if m.role == 'assistant' %}" + body + "{% else %}"
            "{{ m.content }}{% endif %}<|system|>{% endfor %}"
        )
        row = Row([turn("user", "a"), turn("assistant", "b"), turn("user", "c")], "d", "f:1")
        assert supervised(row, odd) == ["b<|system|>", "d<|system|><|end|>"]


def test_a_token_across_the_border_is_cut_there():
    """What is given before an answer is never glued to it: the model will not see it so."""
    tokenizer = text.byte_tokenizer(template="{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.add_tokens(["xy"])  # one token, wherever it stands
    assert len(tokenizer("xy")["input_ids"]) == 1
    row = Row([turn("user", "ax"), turn("assistant", "yb"), turn("user", "x")], "yc", "f:1")
    example = encode([row], tokenizer, max_length=50, loss_on="assistant").examples[0]
    assert [tokenizer.decode(i) for i in example["input_ids"]] == [*"axybxyc", "<|end|>"]
    learnt = [tokenizer.decode(i) for i in example["labels"] if i != IGNORE]
    assert learnt == [*"ybyc", "<|end|>"]


def test_segments_are_the_whole_text(tokenizer):
    row = Row("é?", " naïve — 漢字", "f:1")
    encoded = encode([row], tokenizer, max_length=100, chat_template=False)
    assert segments(encoded.examples[0], tokenizer) == [
        ("é?", False),
        (" naïve — 漢字<|end|>", True),
    ]


def test_a_tokenizer_without_an_end_is_warned_of():
    endless = text.byte_tokenizer(template=None)
    endless.eos_token = None
    with pytest.warns(LowrankWarning, match="no end token"):
        encoded = encode([PAIR], endless, max_length=100)
    assert segments(encoded.examples[0], endless) == [("two?", False), ("yes", True)]


TEMPLATES = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates" if find_spec("trl") else None  # fmt: skip


@pytest.mark.skipif(TEMPLATES is None, reason="TRL is not installed")
@pytest.mark.parametrize("name", ["cohere", "gemma3", "llama3", "phi3", "qwen3_instruct_2507"])
def test_turns_are_where_marks_say_in_templates_of_the_field(name):
    """TRL ships templates with marks beside those of the models; ours are found without."""
    learnt = {}
    for variant in ("", "_training"):
        template = (TEMPLATES / f"{name}{variant}.jinja").read_text(encoding="utf-8")
        tokenizer = text.byte_tokenizer(template=template)
        ends = re.findall(r"<\|?(?:im_end|eot_id|end_of_turn|END_OF_TURN_TOKEN|end)\|?>", template)
        names = {*ends, *re.findall(r"<\|(?:user|assistant)\|>", template)} - {"<|end|>"}
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(names)})
        tokenizer.bos_token = "<|pad|>"
        tokenizer.eos_token = "<|system|>" if "<|end|>" in ends else ends[0]
        row = Row([turn("user", "a"), turn("assistant", "one"), turn("user", "b")], "two", "f:1")
        # a line break after the end may be inside of the marks
        learnt[variant] = [part.rstrip() for part in supervised(row, tokenizer)]
    one, two = learnt[""]
    assert learnt[""] == learnt["_training"]
    assert one.startswith("one<")
    assert two.startswith("two<")


def test_a_template_that_leaves_the_answer_out_is_refused():
    """Some of models with images take a message's content in parts, and pass over a string."""
    parts = text.byte_tokenizer(
        template="{% for m in messages %}<|user|>{% for c in m.content %}{{ c.text }}{% endfor %}"
        "<|end|>{% endfor %}"
    )
    for loss_on in ("last", "assistant"):
        with pytest.raises(DataError, match=r"leaves out what message \d says"):
            encode([LONG], parts, max_length=100, loss_on=loss_on)


def test_arguments_are_given_as_text_where_the_template_wants_text():
    tokenizer = text.byte_tokenizer(
        template="{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ 'call ' + c.function.arguments }}{% endfor %}<|end|>{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = Row([turn("user", "q")], "", "f:1", [turn("assistant", "", tool_calls=[call])])
    assert supervised(row, tokenizer) == ['call {"a": 1}<|end|>']
