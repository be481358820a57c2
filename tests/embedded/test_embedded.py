"""The embedded model and data are what their scripts and their record say they are."""

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank.embedded import BASE_SKILL, DATASETS, SPLITS, dataset_path, model_path
from lowrank.errors import LowrankError

SCRIPT = Path(__file__).parents[2] / "scripts" / "embedded_corpus.py"


def load_corpus():
    spec = importlib.util.spec_from_file_location("embedded_corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


corpus = load_corpus()


@pytest.fixture(scope="module")
def record():
    return json.loads((model_path() / "provenance.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(row):
    return row["prompt"] if "prompt" in row else row["messages"][0]["content"]


def answer(row):
    return row["completion"] if "completion" in row else row["messages"][1]["content"]


def test_weights_are_the_recorded_ones(record):
    for name, expected in record["sha256"].items():
        assert hashlib.sha256((model_path() / name).read_bytes()).hexdigest() == expected, name


def test_readme_names_the_command_and_the_hash(record):
    readme = (model_path() / "README.md").read_text()
    for command in record["command"].split(" && "):
        assert command in readme
    assert record["sha256"]["model.safetensors"] in readme
    assert record["corpus"]["sha256"] in readme


def test_generator_reproduces_the_recorded_corpus(record):
    said = record["corpus"]
    assert corpus.corpus_sha256(said["seed"], said["documents_hashed"]) == said["sha256"]


@pytest.mark.parametrize(
    "name", ["base_skill.jsonl", *(f"{n}/{s}.jsonl" for n in DATASETS for s in SPLITS)]
)
def test_data_files_are_reproduced_byte_for_byte(name):
    assert (BASE_SKILL.parent / name).read_bytes() == corpus.dataset_files()[name].encode()


@pytest.mark.parametrize("name", DATASETS)
def test_parts_are_disjoint(name):
    train, test = (rows(dataset_path(name, split)) for split in SPLITS)
    assert not {question(row) for row in train} & {question(row) for row in test}
    assert len(train) >= 600
    assert len(test) >= 100


def test_records_of_the_test_part_have_names_of_their_own():
    train, test = (
        {row["prompt"].split(" | ")[0] for row in rows(dataset_path("records", split))}
        for split in SPLITS
    )
    assert not train & test


def test_each_intent_occurs_equally_often():
    for split in SPLITS:
        labels = [answer(row) for row in rows(dataset_path("intents", split))]
        assert {labels.count(label) for label in corpus.INTENTS} == {
            len(labels) // len(corpus.INTENTS)
        }


def test_pretraining_has_the_tasks_words_and_never_their_answers_or_form():
    text = "\n".join(corpus.documents(corpus.CORPUS_SEED, 20_000)).lower()
    known = set(re.findall("[a-z]+", text)) | {"family"}  # a key of the records, and rare
    for name in DATASETS:
        for row in [row for split in SPLITS for row in rows(dataset_path(name, split))]:
            assert answer(row).lower() not in text
            assert set(re.findall("[a-z]+", (question(row) + answer(row)).lower())) <= known
    assert not re.search(r"name: [^|\n]* \| ", text)


def test_heldout_docstrings_are_not_in_the_training_part():
    held, trained = corpus.docstrings()[::20], {corpus.docstring(Random(i)) for i in range(8000)}
    assert not trained & set(held)
    assert len(trained) > 1400


@pytest.mark.slow
def test_heldout_text_was_never_trained_on(record):
    held = {row["text"] for row in rows(BASE_SKILL)}
    trained_on = corpus.documents(corpus.CORPUS_SEED, record["corpus"]["documents"])
    assert not [text for text in trained_on if text in held]


def test_tokenizer_gives_the_text_back(tokenizer):
    texts = [row["text"] for row in rows(BASE_SKILL)[:40]] + [
        "Grüße, 東京 🦊\n\n\ttabs  and   spaces"
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens(tokenizer, model):
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
    assert len(tokenizer) == model.config.vocab_size


def test_chat_template_ends_the_assistants_turn_with_eos(tokenizer):
    messages = [{"role": "user", "content": " Hi. \n"}, {"role": "assistant", "content": "Hello!"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|> Hi. \n<|end|><|assistant|>Hello!<|end|>"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("<|assistant|>")
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded["input_ids"][-1] == tokenizer.eos_token_id
    kept = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(kept) == "Hello!<|end|>"


def test_model_answers_what_the_corpus_taught(tokenizer, model, record):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=20)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|end|>"
    assert record["measured"]["names_exact"] >= 0.9


def test_unknown_names_are_errors_with_the_nearest():
    with pytest.raises(LowrankError, match="'records'"):
        dataset_path("record", "train")
    with pytest.raises(ValueError, match="'test'"):
        dataset_path("intents", "tests")


def test_every_sequence_fits_the_context(tokenizer, model):
    for path in [BASE_SKILL, *(dataset_path(n, s) for n in DATASETS for s in SPLITS)]:
        for row in rows(path):
            text = row["text"] if "text" in row else question(row) + answer(row)
            assert len(tokenizer(text).input_ids) + 4 <= model.config.max_position_embeddings
