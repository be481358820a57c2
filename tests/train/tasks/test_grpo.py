"""GRPO: answers that a model samples itself, scored by rules; on arithmetic as GSM8K writes it."""

import gc
import random
import warnings

import pytest
import text
import tiny
import torch
import transformers
from safetensors.torch import load_file
from test_on_trl import Chosen

from lowrank import LoraConfig, compat, get_peft_model
from lowrank.errors import LowrankWarning
from lowrank.train.data.encode import encode, prompt_ids
from lowrank.train.data.problems import DataError
from lowrank.train.data.rows import ReadData, read_data, rows_of
from lowrank.train.data.shapes import Row
from lowrank.train.evaluate import answer_rows
from lowrank.train.settings import TrainSettings
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.on_trl import LOSSES, TaskSettingsError, trl_class
from lowrank.train.tasks.rewards import RewardError, last_number
from lowrank.train.tasks.sft import train_sft
from lowrank.train.tasks.table import TASKS

TOKENIZER = text.byte_tokenizer()
SUMS = [Row(f"{a}+{4 - a}?", f"{a} and {4 - a}.\n#### 4", f"f:{a}") for a in range(4)]
GRPO = TASKS["grpo"]


@pytest.fixture(scope="module", autouse=True)
def standing_in():
    with compat.standing_in():
        trl_class("grpo", 0)
        gc.freeze()
        yield
        gc.unfreeze()


def given(**options):
    fast = {"max_steps": 20, "learning_rate": 2e-2, "batch_size": 32, "logging_steps": 4}
    own = {"reward_functions": ["final_number"], "max_completion_length": 4, "num_generations": 8}
    return Chosen(TrainSettings(task="grpo", **{**fast, **own, "save_steps": 10, **options}))


def prepared(settings, rows=SUMS, tokenizer=TOKENIZER):
    return GRPO.prepare(rows, tokenizer, settings, max_length=40)


@pytest.fixture(scope="module")
def guessing(tmp_path_factory):
    """A model that answers with 3 or 4, and rather with 3: it knows the form alone."""
    torch.manual_seed(0)
    model = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32)
    draw = random.Random(0)
    rows = [Row(row.prompt, f"#{draw.choice('334')}", row.where) for row in SUMS for _ in range(32)]
    fast = {"learning_rate": 1e-2, "batch_size": 32, "save_steps": 100}
    settings = TrainSettings(method="full", max_steps=60, **fast)
    data = encode(rows, TOKENIZER, max_length=40)
    train_sft(model, TOKENIZER, data, None, tmp_path_factory.mktemp("sft"), settings)
    return {name: value.clone() for name, value in model.state_dict().items()}


def adapted(weights):
    torch.manual_seed(1)
    model = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32)
    model.load_state_dict(weights)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def fit(weights, folder, settings, **options):
    model = adapted(weights)
    result = GRPO.train(
        Given(model, TOKENIZER, prepared(settings), None, folder, settings, options)
    )
    return model, result


@pytest.fixture(scope="module")
def trained(guessing, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    return *fit(guessing, folder, given()), folder


def test_it_learns_what_is_rewarded(trained, guessing):
    model, result, _ = trained
    data, settings = prepared(given(), SUMS * 8), given()
    before = GRPO.evaluate(adapted(guessing), TOKENIZER, data, settings).scores
    after = GRPO.evaluate(model, TOKENIZER, data, settings)
    assert before["reward"] == 0.0
    assert after.scores["reward"] == 1.0
    assert after.scores["sampled_reward"] > before["sampled_reward"] + 0.1
    rewards = [line["reward"] for line in result.history]
    assert rewards[-1] > rewards[0] + 0.05
    assert {"reward_std", "frac_reward_zero_std", "completions/mean_length"} <= set(
        result.history[0]
    )


def test_rewards_are_those_of_the_answers(trained):
    """The mean reward again, from the answers in the report."""
    model, *_ = trained
    found = GRPO.evaluate(model, TOKENIZER, prepared(given()), given())
    right = [last_number(a.answer) == last_number(a.expected) for a in found.answers]
    assert [a.exact for a in found.answers] == right
    assert found.scores["reward"] == sum(right) / len(SUMS)
    assert [a.answer for a in found.answers] == answer_rows(
        model, TOKENIZER, SUMS, max_new_tokens=4
    )


def test_resume_ends_where_the_whole_run_ended(trained, guessing, tmp_path):
    model, result, folder = trained
    middle = folder / "checkpoint-10"
    again, resumed = fit(guessing, tmp_path, given(), resume_from=middle)
    assert resumed.steps == result.steps
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_trl_is_given_the_tokens_of_fine_tuning(guessing, monkeypatch, tmp_path):
    from trl import GRPOTrainer

    seen, real = [], GRPOTrainer._generate_single_turn

    def looking(self, ids, *args, **kwargs):
        seen.extend(tuple(row) for row in ids)
        return real(self, ids, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", looking)
    settings = given(max_steps=1, beta=0.05, temperature=0.7)
    model, _ = fit(guessing, tmp_path, settings)
    texts = [f"<|user|>{row.prompt}<|end|>\n<|assistant|>" for row in SUMS]
    assert set(seen) == {tuple(ids) for ids in prompt_ids(texts, TOKENIZER, templated=True)}
    assert list(model.peft_config) == ["default"]  # beta is above 0: TRL would copy the adapter


def test_probabilities_are_those_of_the_row_alone(monkeypatch, tmp_path):
    """GPT-2 counts positions from the edge of the batch, and prompts of other lengths stand at its right."""
    from trl import GRPOTrainer

    found, real = [], GRPOTrainer._get_per_token_logps_and_entropies

    def looking(self, model, ids, mask, kept, *args, **kwargs):
        out = real(self, model, ids, mask, kept, *args, **kwargs)
        for i in range(0, len(ids), 8):
            alone, n = ids[i][mask[i].bool()], int(mask[i, -kept:].sum())
            with torch.no_grad():
                table = torch.log_softmax(model(input_ids=alone[None]).logits[0].double(), -1)
            expected = table[:-1].gather(1, alone[1:, None])[-n:, 0]
            found.append(float((out[0][i][:n].detach() - expected).abs().max()))
        return out

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", looking)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    tokens = {"vocab_size": text.VOCABULARY, "eos_token_id": 2, "bos_token_id": 1}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = given(max_steps=1)
    rows = [Row("1", "1", "f:1"), Row("1 and 1?", "2", "f:2"), *SUMS[:2]]
    data = prepared(settings, rows)
    GRPO.train(Given(get_peft_model(model, config), TOKENIZER, data, None, tmp_path, settings))
    assert len(found) == 4
    assert max(found) < 1e-4


@pytest.mark.parametrize("loss", LOSSES["grpo"][1:])
def test_every_loss_of_trl(loss, guessing, tmp_path):
    _, result = fit(guessing, tmp_path, given(max_steps=1, loss_type=loss, batch_size=8))
    assert result.train_loss == result.train_loss


def test_prompts_that_leave_no_room_are_dropped():
    data = prepared(given(max_completion_length=20), [*SUMS, Row("x" * 30, "1", "f:9")])
    assert (data.dropped, len(data.rows), data.longest) == (1, 4, 15)
    assert data.parts(0, TOKENIZER) == [("", [("<|user|>0+4?<|end|>\n<|assistant|>", False)])]
    with pytest.raises(DataError, match="none of the 4 prompts leaves room for 35 tokens"):
        prepared(given(max_completion_length=35))
    with pytest.raises(DataError, match="1 of 1 rows are text without a prompt"):
        prepared(given(), [Row(None, "text", "f:1")])


def test_prompts_need_no_answer_where_no_reward_does(guessing, tmp_path):
    path = text.write_rows(tmp_path / "p.jsonl", *({"prompt": row.prompt} for row in SUMS))
    rows = read_data([path], takes=GRPO.takes).rows
    assert rows_of(GRPO, ReadData(rows, {}, [], 0, "")) == rows
    assert [(row.prompt, row.answer) for row in rows] == [(row.prompt, "") for row in SUMS]
    (tmp_path / "own.py").write_text(
        "def vowels(completions, answer=None):\n"
        "    assert answer is None\n"
        "    return [float(sum(c in 'aeiou' for c in text)) for text in completions]\n"
    )
    own = {"reward_functions": f"{tmp_path}/own.py:vowels", "batch_size": 8, "max_steps": 1}
    settings, model = given(**own), adapted(guessing)
    data = prepared(settings, rows)
    assert data.examples[0].keys() == {"prompt"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LowrankWarning)  # no vowel at all may be said
        result = GRPO.train(Given(model, TOKENIZER, data, None, tmp_path / "out", settings))
    assert result.steps == 1
    found = GRPO.evaluate(model, TOKENIZER, data, settings)
    assert found.scores["reward"] == sum(c in "aeiou" for a in found.answers for c in a.answer) / 4
    with pytest.raises(DataError, match=r"3 of 4 rows have no answer .*:2.* final_number of"):
        prepared(given(), [SUMS[0], *rows[1:]])


def test_the_best_state_is_that_of_most_reward(guessing, tmp_path):
    rate = {"learning_rate": 2e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    settings = given(
        max_steps=3, eval_steps=1, save_steps=None, load_best_model_at_end=True, seed=1, **rate
    )
    model, data = adapted(guessing), prepared(given())
    found = []

    def measure():
        found.append(0.5 if len(found) == 1 else 0.25)  # best in the middle
        return {"reward": found[-1]}

    result = GRPO.train(
        Given(model, TOKENIZER, data, data, tmp_path, settings, {"measure": measure})
    )
    lines = [line for line in result.history if "eval_reward" in line]
    assert [(line["step"], line["eval_reward"]) for line in lines] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.25),
    ]
    assert not any("reward" in line or "eval_loss" in line for line in lines)
    assert (result.best.step, result.best.metric, result.best.value) == (2, "reward", 0.5)
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    now = dict(model.named_parameters())
    for key, tensor in saved.items():
        assert torch.equal(tensor, now[key.replace(".weight", ".default.weight")])
    settings, model = (
        given(max_steps=1, eval_steps=1, save_steps=None, batch_size=8),
        adapted(guessing),
    )
    result = GRPO.train(Given(model, TOKENIZER, data, data, tmp_path, settings))
    (line,) = (line for line in result.history if "eval_reward" in line)
    now = GRPO.evaluate(model, TOKENIZER, data, settings).scores
    assert {name: line[f"eval_{name}"] for name in now} == now


def test_rewards_that_are_all_alike_are_said(guessing, tmp_path):
    settings = given(max_steps=1, batch_size=8, reward_functions=["length:50"])
    with pytest.warns(LowrankWarning, match="had the same reward, so that nothing was learnt"):
        fit(guessing, tmp_path, settings)


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"reward_functions": None}, TaskSettingsError, "train.reward_functions is missing"),
        ({"reward_functions": "final"}, RewardError, "Did you mean 'final_number'"),
        ({"reward_weights": [1.0, 2.0]}, TaskSettingsError, "2 numbers for 1 reward functions"),
        ({"num_generations": 5}, TaskSettingsError, "32 is no multiple of train.num_generations 5"),
        ({"fsdp": True}, TaskSettingsError, "ZeRO-3 shares the weights too"),
        ({"num_generations": 1}, TaskSettingsError, "compared with each other"),
        ({"max_completion_length": 40}, TaskSettingsError, "leaves no room for a prompt"),
        ({"method": "full", "beta": 0.1}, TaskSettingsError, "a second copy"),
    ],
)
def test_settings_that_grpo_cannot_honour(options, error, why):
    with pytest.raises(error, match=why):
        prepared(given(**options))
