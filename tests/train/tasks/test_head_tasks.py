"""Tags, spans, encoder-decoders and embeddings: what is learnt, what is measured, what is refused."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import text
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, BertForQuestionAnswering

from lowrank import LoraConfig, compat, get_peft_model, read_adapter
from lowrank.cli import main
from lowrank.cli.opening import model_path, open_base, open_tokenizer
from lowrank.embedded import dataset_path
from lowrank.errors import ModelFolderError
from lowrank.train.data.encode import IGNORE
from lowrank.train.data.problems import DataError
from lowrank.train.data.rows import read_data, rows_of
from lowrank.train.data.shapes import Row
from lowrank.train.data.task_shapes import Question, Related, Tagged
from lowrank.train.settings import DataSettings, EvalSettings, TrainSettings
from lowrank.train.tasks.embedding import SCALE, embed_all, in_batch, ordered
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.table import TASKS

TAGS, SPANS = TASKS["token-classification"], TASKS["question-answering"]
SEQ2SEQ, EMBEDDING = TASKS["seq2seq"], TASKS["embedding"]


def sections(task, data=None, evaluation=None, **train):
    return SimpleNamespace(
        data=DataSettings(**(data or {})),
        train=TrainSettings(**{"batch_size": 8, "task": task.name, **train}),
        eval=EvalSettings(**{"batch_size": 7, **(evaluation or {})}),
    )


def prepared(task, rows, max_length=64, like=None, **data):
    settings = sections(task, data)
    return task.prepare(rows, text.byte_tokenizer(), settings, max_length=max_length, like=like)


def fitted(task, base, tokenizer, train, test, settings, folder, r=8):
    """The scores before and after training, and the model."""
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=16, target_modules="all-linear", task_type=task.task_type)
    model = get_peft_model(base, config)
    before = task.evaluate(model, tokenizer, test, settings)
    with compat.standing_in():
        result = task.train(Given(model, tokenizer, train, test, folder, settings))
    after = task.evaluate(model, tokenizer, test, settings)
    if "loss" in after.scores:
        losses = [line["eval_loss"] for line in result.history if "eval_loss" in line]
        assert losses[-1] == pytest.approx(after.scores["loss"], rel=1e-4)
    return before.scores, after.scores, model


# --- tags -------------------------------------------------------------------------------------------


def records(split, count):
    lines = dataset_path("records", split).read_text().splitlines()[:count]
    for n, line in enumerate(lines):
        row = json.loads(line)
        fields = dict(part.split(": ") for part in row["prompt"].strip().split(" | "))
        yield fields, row["completion"].rstrip("."), f"{split}:{n}"


def tagged(split, count):
    """Sentences of the embedded records, in which names and foods are tagged."""
    for fields, said, where in records(split, count):
        words = said.split()
        tags = ["O"] * len(words)
        for kind in ("name", "food"):
            value = fields.get(kind, "").split()
            for i in range(len(words) - len(value) + 1):
                if value and words[i : i + len(value)] == value:
                    tags[i : i + len(value)] = [f"B-{kind}"] + [f"I-{kind}"] * (len(value) - 1)
        yield Tagged(words, tags, where)


def test_tags_are_learnt(tmp_path):
    tokenizer, settings = (
        open_tokenizer(model_path("embedded")),
        sections(TAGS, learning_rate=3e-3, max_steps=40),
    )
    train = TAGS.prepare(list(tagged("train", 320)), tokenizer, settings, max_length=128)
    test = TAGS.prepare(
        list(tagged("test", 60)), tokenizer, settings, max_length=128, like=train.model_options
    )
    base = open_base(
        model_path("embedded"),
        dtype="auto",
        device="cpu",
        task_type="TOKEN_CLS",
        **train.model_options,
    )
    before, after, model = fitted(TAGS, base, tokenizer, train, test, settings, tmp_path)
    assert list(after) == ["entity_f1", "token_accuracy", "loss"]
    assert before["entity_f1"] < 0.1
    assert after["entity_f1"] > 0.5
    model.save_pretrained(tmp_path / "adapter")
    heads = [k for k in read_adapter(tmp_path / "adapter").tensors if ".score." in k]
    assert len(heads) == 2  # its weight and its bias


def test_the_first_token_of_a_word_has_its_tag_and_the_rest_none():
    rows = [Tagged(["Ann", "ö", "is", "x y"], ["B-P", "I-P", "O", "B-Q"], "f:1")]
    data = prepared(TAGS, rows)
    assert list(data.model_options["label2id"]) == ["B-P", "B-Q", "I-P", "O"]
    # a token a byte, ö in two: "Ann ö is x y"
    labels = data.examples[0]["labels"]
    assert [(i, label) for i, label in enumerate(labels) if label != IGNORE] == [
        (0, 0),
        (4, 2),
        (7, 3),
        (10, 1),
    ]
    assert data.supervised == 4
    cut = prepared(TAGS, rows, max_length=6)
    assert (cut.truncated, cut.supervised, cut.longest) == (1, 2, 6)


def closed_tokenizer():
    """As BERT's: something before each text, and something after."""
    tokenizer = text.byte_tokenizer()
    begin, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<|system|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|system|>",
        pair="<|user|> $A <|system|> $B:1 <|system|>:1",
        special_tokens=[("<|user|>", begin), ("<|system|>", end)],
    )
    return tokenizer, begin, end


def test_special_tokens_around_words_and_spans():
    tokenizer, begin, end = closed_tokenizer()
    row = Tagged(["ab", "c", "de"], ["B-X", "O", "B-X"], "f:1")
    data = TAGS.prepare([row], tokenizer, sections(TAGS), max_length=6)
    (example,) = data.examples  # begin a b _ c end: the last word is cut away
    assert [example["input_ids"][i] for i in (0, -1)] == [begin, end]
    assert example["labels"] == [IGNORE, 0, IGNORE, IGNORE, 1, IGNORE]
    asked = Question("q?", "xx yyy zz", [("yyy", 3)], "f:1")
    data = SPANS.prepare([asked], tokenizer, sections(SPANS, {"doc_stride": 4}), max_length=12)
    first, last, tokens = data.examples[0]["labels"]
    # begin q ? end xx_yyy_ end: 7 characters of the text beside 5 other tokens
    assert (first, last, tokens) == (7, 9, 12)
    assert (data.characters[0][first], data.characters[0][last]) == ((3, 4), (5, 6))


def test_tags_that_cannot_be_learnt():
    rows = [Tagged(["a", "b"], ["O", "B-X"], "f:1")]
    like = prepared(TAGS, rows).model_options
    with pytest.raises(DataError, match=r"do not have: 'B-Y' \(f:2\)"):
        prepared(TAGS, [Tagged(["a"], ["B-Y"], "f:2")], like=like)
    with pytest.raises(DataError, match="nothing to learn from"):
        prepared(TAGS, [Tagged(["\u200b"], ["O"], "f:1")], max_length=0)


def test_words_that_were_cut_away_are_misses():
    rows = [Tagged(["aa", "bb"], ["B-X", "B-X"], "f:1"), Tagged(["c"], ["O"], "f:2")]
    data = prepared(TAGS, rows, max_length=3)
    config = tiny.bert(dtype=torch.float32).config
    config.update({**data.model_options, "vocab_size": text.VOCABULARY})
    from transformers import BertForTokenClassification

    model = BertForTokenClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))  # always B-X
    scores = TAGS.evaluate(model, text.byte_tokenizer(), data, sections(TAGS)).scores
    assert scores["entity_f1"] == pytest.approx(2 * 1 / (2 + 2))
    assert scores["token_accuracy"] == pytest.approx(1 / 3)


# --- spans ------------------------------------------------------------------------------------------


def asked(count, pad=0):
    """Texts in which the answer is the one number."""
    for i in range(count):
        words = ["ab", "cde", "f", "gh"][i % 4 :] + ["xy"] * (i % 3) + ["z"] * pad
        words.insert(i % (len(words)), f"{(i * 37) % 90 + 10}")
        context = " ".join(words)
        number = next(word for word in words if word.isdigit())
        yield Question("which?", context, [(number, context.index(number))], f"f:{i}")


def bert_for_questions():
    return tiny.bert(BertForQuestionAnswering, dtype=torch.float32, vocab_size=text.VOCABULARY)


def test_spans_are_learnt(tmp_path):
    tokenizer, rows = text.byte_tokenizer(), list(asked(48))
    train, test = prepared(SPANS, rows[12:]), prepared(SPANS, rows[:12])
    settings = sections(SPANS, learning_rate=2e-2, max_steps=50, eval_steps=50)
    before, after, _ = fitted(
        SPANS, bert_for_questions(), tokenizer, train, test, settings, tmp_path
    )
    assert list(after) == ["squad_f1", "squad_em", "loss"]
    assert before["squad_f1"] < 0.3
    assert after["squad_f1"] > 0.5


def test_windows_of_a_long_text_share_their_stride_and_one_holds_the_answer():
    row = next(asked(1, pad=40))
    data = prepared(SPANS, [row], max_length=30, doc_stride=8)
    places = [[p for p in window if p] for window in data.characters]
    for before, after in pairwise(places):
        assert before[-8:] == after[:8]
    assert places[0][0] == (0, 1)
    assert places[-1][-1] == (len(row.context) - 1, len(row.context))
    said = set()
    for example, window in zip(data.examples, data.characters, strict=True):
        first, last, _ = example["labels"]
        if (first, last) != (0, 0):
            said.add(row.context[window[first][0] : window[last][1]])
        assert len(example["input_ids"]) <= 30
    assert said == {row.answers[0][0]}
    with pytest.raises(DataError, match=r"leave less than data\.doc_stride=25"):
        prepared(SPANS, [row], max_length=30, doc_stride=25)


class Pointing(torch.nn.Module):
    """Logits that point at given tokens of each window."""

    def __init__(self, spans, scores):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.spans, self.scores = spans, scores
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(pad_token_id=0))

    def forward(self, input_ids, **_):
        start, end = torch.zeros(2, *input_ids.shape)
        for i, row in enumerate(input_ids.tolist()):
            first, last = self.spans[tuple(x for x in row if x)]
            start[i, first] = end[i, last] = self.scores
        return SimpleNamespace(start_logits=start, end_logits=end)


def test_the_best_span_of_all_windows_is_the_answer_and_none_where_there_is_none():
    row, none = next(asked(1, pad=20)), Question("which?", "abc def", [], "f:9")
    data = prepared(SPANS, [row, none], max_length=30, doc_stride=8)
    spans = {tuple(e["input_ids"]): e["labels"][:2] for e in data.examples}
    right = SPANS.evaluate(Pointing(spans, 9.0), text.byte_tokenizer(), data, sections(SPANS))
    assert (right.rows, right.scores["squad_em"]) == (2, 1.0)
    assert [answer.answer for answer in right.answers] == [row.answers[0][0], ""]
    wrong = Pointing({ids: [8, 9] for ids in spans}, 9.0)
    found = SPANS.evaluate(wrong, text.byte_tokenizer(), data, sections(SPANS))
    assert found.scores["squad_em"] == 0
    assert all(answer.answer for answer in found.answers)


def test_a_model_whose_question_class_would_be_random_is_refused():
    """transformers' LlamaForQuestionAnswering takes none of a causal model's weights."""
    with pytest.raises(ModelFolderError, match="which would be random"):
        open_base(model_path("embedded"), dtype="auto", device="cpu", task_type="QUESTION_ANS")


def test_squads_own_file(tmp_path):
    asked = {"id": "1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}
    none = {"id": "2", "question": "When?", "is_impossible": True, "answers": []}
    broken = {"id": "3", "question": "Where?", "answers": [{"text": "Rom", "answer_start": 3}]}
    file = tmp_path / "train-v2.0.json"

    def write(*questions):
        paragraph = {"context": "Ann went to Rome.", "qas": list(questions)}
        articles = [{"title": "Ann", "paragraphs": [paragraph]}]
        file.write_text(json.dumps({"version": "v2.0", "data": articles}))

    write(asked, none)
    rows = read_data([file], takes=Question).rows
    assert [(row.question, row.answers) for row in rows] == [("Who?", [("Ann", 0)]), ("When?", [])]
    assert read_data([file], takes=Row, on_bad_row="skip").rows[0].answer == "Ann"
    write(asked, broken)
    with pytest.raises(DataError, match="'Rom' is at 3 of `context`, and it is not"):
        read_data([file], takes=Question)


# --- encoder and decoder ----------------------------------------------------------------------------


def pairs(count):
    return [
        Row(f"{'ab'[i % 2]}{'xyz'[: i % 3]}", ("one", "red")[i % 2], f"f:{i}") for i in range(count)
    ]


def tiny_t5():
    return tiny.t5(
        dtype=torch.float32,
        vocab_size=text.VOCABULARY,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )


def test_an_encoder_decoder_learns(tmp_path):
    tokenizer, data = text.byte_tokenizer(), prepared(SEQ2SEQ, pairs(16), chat_template=False)
    settings = sections(
        SEQ2SEQ,
        {"chat_template": False},
        {"max_new_tokens": 4, "generate": 4, "temperature": 2.0, "seed": 3},
        learning_rate=2e-2,
        max_steps=40,
        eval_steps=40,
    )
    before, after, model = fitted(SEQ2SEQ, tiny_t5(), tokenizer, data, data, settings, tmp_path)
    greedy = ["rouge_l", "rouge_1", "rouge_2", "exact_match"]
    assert list(after) == [*greedy, *(f"sampled_{n}" for n in greedy), "loss", "perplexity"]
    assert before["rouge_l"] < 0.2
    assert after["rouge_l"] > 0.5
    again = SEQ2SEQ.evaluate(model, tokenizer, data, settings)
    assert again.scores == after  # samples are drawn by their seed


def test_evaluate_and_generate_with_an_encoder_decoder(tmp_path, capsys):
    tiny_t5().save_pretrained(tmp_path / "base")
    text.byte_tokenizer(template=None).save_pretrained(tmp_path / "base")
    rows = text.write_rows(tmp_path / "rows.jsonl", {"dialogue": "a b", "summary": "ab"})
    words = [f"{tmp_path}/base", "--data", f"{rows}", "--max-new-tokens", "3", "--json"]
    assert main(["evaluate", *words, "--temperature", "1.5", "--metrics", "bleu", "rouge_2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "seq2seq"
    assert {"bleu", "sampled_rouge_2", "loss"} <= set(found)
    assert main(["generate", f"{tmp_path}/base", "a b", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip() == found["answers"][0]["answer"]
    assert main(["evaluate", *words, "--doc_stride", "3"]) == 2
    assert "data.doc_stride has no meaning for task seq2seq" in capsys.readouterr().err


def test_the_decoder_is_given_the_answer_one_place_later_and_learns_its_end():
    rows, model = pairs(3), tiny_t5().eval()
    data = prepared(SEQ2SEQ, rows, chat_template=False)
    assert all(e["labels"][-1] == text.byte_tokenizer().eos_token_id for e in data.examples)
    found = SEQ2SEQ.evaluate(
        model, text.byte_tokenizer(), data, sections(SEQ2SEQ, evaluation={"generate": 0})
    )
    nats = 0.0
    for example in data.examples:  # transformers' own shift, one row at a time
        inputs = {name: torch.tensor([ids]) for name, ids in example.items()}
        nats += model(**inputs).loss.item() * len(example["labels"])
    assert found.scores["loss"] == pytest.approx(nats / data.supervised, rel=1e-5)


def test_rows_that_an_encoder_cannot_read_and_those_that_are_cut():
    with pytest.raises(DataError, match="1 rows have no prompt, the first: f:1"):
        prepared(SEQ2SEQ, [Row(None, "text", "f:1")])
    rows = [Row("a" * 40, "b" * 30, "f:1"), Row("a", "b", "f:2")]
    data = prepared(SEQ2SEQ, rows, max_length=20, chat_template=False, max_target_length=9)
    assert data.truncated == 1
    assert [len(data.examples[0][name]) for name in ("input_ids", "labels")] == [20, 9]
    assert text.byte_tokenizer().eos_token_id not in data.examples[0]["labels"]


# --- embeddings -------------------------------------------------------------------------------------


def related(split, count):
    for n, line in enumerate(dataset_path("intents", split).read_text().splitlines()[:count]):
        asked, intent = (message["content"] for message in json.loads(line)["messages"])
        yield Related(asked, intent, f"{split}:{n}")


def test_embeddings_are_learnt(tmp_path):
    tokenizer, settings = (
        open_tokenizer(model_path("embedded")),
        sections(EMBEDDING, learning_rate=2e-3, max_steps=25, batch_size=16),
    )
    train, test = (
        EMBEDDING.prepare(list(related(split, count)), tokenizer, settings, max_length=64)
        for split, count in (("train", 400), ("test", 80))
    )
    base = open_base(
        model_path("embedded"), dtype="auto", device="cpu", task_type="FEATURE_EXTRACTION"
    )
    before, after, _ = fitted(EMBEDDING, base, tokenizer, train, test, settings, tmp_path)
    assert before["recall_at_1"] < 0.15
    assert after["recall_at_1"] > 0.2


def test_in_batch_negatives_by_hand():
    """In float64, from the definition; rows 0 and 2 have one positive, which is no negative of theirs."""
    torch.manual_seed(0)
    anchors, others = torch.nn.functional.normalize(torch.randn(9, 5), dim=-1).split([3, 6])
    loss = in_batch(anchors, others, torch.tensor([4, 7, 4]))
    expected = 0.0
    for i in range(3):
        scores = [
            SCALE * float(anchors[i].double() @ others[j].double())
            for j in range(6)
            if not (j != i and {i, j} == {0, 2})
        ]
        own = SCALE * float(anchors[i].double() @ others[i].double())
        expected += float(torch.logsumexp(torch.tensor(scores), 0)) - own
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_ordered_by_hand():
    torch.manual_seed(0)
    first, second = torch.nn.functional.normalize(torch.randn(2, 4, 5), dim=-1)
    scores = torch.tensor([3.0, 1.0, 5.0, 1.0])
    cosines = (first * second).sum(-1).tolist()
    total = 1.0
    for i in range(4):
        for j in range(4):
            if scores[i] < scores[j]:  # i should be the farther
                total += torch.tensor(SCALE * (cosines[i] - cosines[j])).exp().item()
    expected = 4 * torch.tensor(total).log()
    assert float(ordered(first, second, scores)) == pytest.approx(float(expected), rel=1e-4)


def test_an_embedding_is_the_mean_of_its_own_tokens_whatever_is_beside_it():
    model = AutoModel.from_config(
        AutoConfig.for_model(
            **{**tiny.bert(dtype=torch.float32).config.to_dict(), "vocab_size": 40}
        )
    ).eval()
    ids = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    together = embed_all(model, ids, 0, batch_size=3)
    with torch.no_grad():
        for row, found in zip(ids, together, strict=True):
            mean = model(input_ids=torch.tensor([row])).last_hidden_state[0].double().mean(0)
            torch.testing.assert_close(found.double(), mean / mean.norm(), rtol=1e-4, atol=1e-6)


def test_scored_pairs_and_triplets(tmp_path):
    path = text.write_rows(
        tmp_path / "rows.jsonl",
        {"sentence1": "aaa", "sentence2": "aab", "score": 4.5},
        {"sentence1": "abc", "sentence2": "xyz", "score": 1},
        {"sentence1": "abd", "sentence2": "abx", "score": 3},
    )
    rows = rows_of(EMBEDDING, read_data([path], takes=Related))
    data = prepared(EMBEDDING, rows)
    model = tiny.bert(dtype=torch.float32, vocab_size=text.VOCABULARY).bert.eval()
    tokenizer, settings = (
        text.byte_tokenizer(),
        sections(EMBEDDING, max_steps=2, learning_rate=1e-3),
    )
    assert list(EMBEDDING.evaluate(model, tokenizer, data, settings).scores) == [
        "spearman",
        "pearson",
    ]
    EMBEDDING.train(Given(model, tokenizer, data, None, tmp_path / "scored", settings))
    triplets = [r._replace(score=None, negative=f"no {i}") for i, r in enumerate(rows)]
    data = prepared(EMBEDDING, triplets)
    EMBEDDING.train(Given(model, tokenizer, data, data, tmp_path / "triplets", settings))
    found = EMBEDDING.evaluate(model, tokenizer, data, settings)
    assert list(found.scores) == ["recall_at_1", "mrr"]
    with pytest.raises(DataError, match="1 of 3 rows have no `negative`"):
        prepared(EMBEDDING, [*triplets[:2], triplets[2]._replace(negative=None)])
