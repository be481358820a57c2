"""DPO, KTO and reward models on TRL's trainers: what they learn, from what reference, and at what cost."""

import gc
import math
import sys
from dataclasses import dataclass, field, replace

import pytest
import text
import tiny
import torch
from safetensors.torch import load_file

from lowrank import LoraConfig, PeftModel, compat, get_peft_model
from lowrank.errors import AdapterNameError, MissingExtraError, TargetError
from lowrank.train.data.shapes import Judged, Preference
from lowrank.train.run.checkpoints import newest_checkpoint
from lowrank.train.settings import DataSettings, EvalSettings, TrainSettings
from lowrank.train.tasks import on_trl
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.on_trl import CLASSES, LOSSES, TaskSettingsError, trl_class
from lowrank.train.tasks.table import TASKS

TOKENIZER = text.byte_tokenizer()
# a better answer is said in small letters, whatever was asked
PAIRS = [
    Preference(f"{i} or {j}?", f"a{j}b"[: 2 + i % 2], f"X{i}Y"[: 2 + j % 2], f"f:{i}{j}")
    for i in range(6)
    for j in range(7)
]
JUDGED = [
    Judged(pair.prompt, pair.chosen if i % 3 else pair.rejected, bool(i % 3), pair.where)
    for i, pair in enumerate(PAIRS)
]


@dataclass
class Chosen:
    train: TrainSettings
    data: DataSettings = field(default_factory=DataSettings)
    eval: EvalSettings = field(default_factory=lambda: EvalSettings(batch_size=8, samples=0))


def given(task, **options):
    fast = {"max_steps": 12, "learning_rate": 1e-2, "batch_size": 6, "logging_steps": 4}
    return Chosen(
        TrainSettings(task=task, **{**fast, "save_steps": 100, "eval_steps": 50, **options})
    )


def adapted(task="dpo", **options):
    torch.manual_seed(3)
    if TASKS[task].task_type == "SEQ_CLS":
        options_of_base = {"vocab": text.VOCABULARY, "num_labels": 1}
        model = tiny.llama_classifier(torch.float32, **options_of_base)
    else:
        model = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32, attention_dropout=0.4)
    config = {"r": 4, "target_modules": "all-linear", "task_type": TASKS[task].task_type}
    return get_peft_model(model, LoraConfig(**{**config, **options}))


def rows_of(task):
    return JUDGED if task == "kto" else PAIRS


def prepared(task, settings):
    def read(rows, **more):
        return TASKS[task].prepare(rows, TOKENIZER, settings, max_length=64, **more)

    train = read(rows_of(task)[::2])
    return train, read(rows_of(task)[1::2], like={})


@pytest.fixture(scope="module", autouse=True)
def standing_in():
    with compat.standing_in():
        for task in CLASSES:
            trl_class(task, 0)
        gc.freeze()  # else each training goes through all that TRL imports, twice
        yield
        gc.unfreeze()


def fit(task, model, folder, settings, **options):
    train, held_out = prepared(task, settings)
    if settings.train.eval_steps > settings.train.max_steps:
        held_out = None
    return TASKS[task].train(Given(model, TOKENIZER, train, held_out, folder, settings, options))


def scores_of(task, model, settings):
    return TASKS[task].evaluate(model, TOKENIZER, prepared(task, settings)[1], settings).scores


@pytest.fixture(scope="module", params=["dpo", "kto", "reward"])
def trained(request, tmp_path_factory):
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = adapted(task)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = given(task, save_steps=6, eval_steps=6)
    result = fit(task, model, folder, settings)
    return task, model, folder, start, settings, result, scores_of(task, model, settings)


def test_it_learns_what_is_preferred(trained):
    task, _, _, _, _, result, scores = trained
    assert scores["preference_accuracy"] > 0.9
    assert scores["reward_margin"] > 0.05
    name = "margin" if task == "reward" else "rewards/margins"
    margins = [line[name] for line in result.history if name in line]
    assert margins[-1] > margins[0] + 0.05
    assert [line["step"] for line in result.history if f"eval_{name}" in line] == [6, 12]


def test_it_starts_at_the_reference(trained):
    """Dropout of the base would show here: it draws again for each of the two."""
    task, *_, result, _ = trained
    if task == "dpo":
        assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if task == "kto":
        assert result.history[0]["loss"] == pytest.approx(0.5, abs=1e-6)
        assert result.history[0]["kl"] == 0


def test_only_the_adapter_moves_and_there_is_no_second_one(trained):
    _, model, folder, start, *_ = trained
    assert list(model.peft_config) == ["default"]
    for name, parameter in model.named_parameters():
        learnt = "lora_" in name or "modules_to_save" in name
        assert torch.equal(parameter, start[name]) != learnt, name
    assert {name for name, _ in model.named_parameters()} == set(start)
    assert "forward" not in vars(model.get_base_model())
    files = {path.name for path in newest_checkpoint(folder).iterdir()}
    assert "adapter_model.safetensors" in files
    assert not files & {"model.safetensors", "ref", "tokenizer.json"}


def test_it_is_one_adapter_that_loads_again(trained, tmp_path):
    task, model, _, _, settings, _, scores = trained
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert any(key.endswith("score.weight") for key in keys) == (task == "reward")
    fresh = adapted(task).unload()
    again = PeftModel.from_pretrained(fresh, tmp_path)
    assert scores_of(task, again, settings) == pytest.approx(scores, abs=1e-5)


def test_resume_ends_where_the_whole_run_ended(trained, tmp_path):
    task, model, folder, _, settings, result, _ = trained
    again = adapted(task)
    middle = folder / "checkpoint-6"
    resumed = fit(task, again, tmp_path, settings, resume_from=middle)
    assert resumed.steps == result.steps
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_no_second_copy_of_the_base_and_every_loss_of_trl(monkeypatch, tmp_path):
    """What TRL holds while it trains: the parameters of the adapted model, and no reference."""
    model, losses, real = adapted(), list(LOSSES["dpo"]), on_trl.trainer_on
    size = sum(p.numel() for p in model.parameters())

    def looking(*args, **kwargs):
        cls = real(*args, **kwargs)

        class Looking(cls):
            def training_step(self, *args, **kwargs):
                assert self.ref_model is None
                held = {id(p): p for m in vars(self).values() for p in parameters_of(m)}
                assert sum(p.numel() for p in held.values()) == size
                self.loss_types, self.label_smoothing = [losses[self.state.global_step]], 0.1
                loss = super().training_step(*args, **kwargs)
                assert torch.isfinite(loss), self.loss_types
                return loss

        return Looking

    monkeypatch.setattr(on_trl, "trainer_on", looking)
    result = fit("dpo", model, tmp_path, given("dpo", max_steps=len(losses)))
    assert result.steps == len(losses)


def parameters_of(value):
    return value.parameters() if isinstance(value, torch.nn.Module) else ()


def test_trls_losses_are_ours():
    """TRL names them in an error alone."""
    import inspect

    for task in ("dpo", "kto", "grpo"):
        source = inspect.getsource(sys.modules[trl_class(task, 0).__module__])
        assert all(f'"{loss}"' in source for loss in LOSSES[task])
    listed = inspect.getsource(trl_class("dpo", 0)).partition("Should be one of [")[2]
    words = listed.partition("]")[0].split("'")[1::2]
    assert sorted(LOSSES["dpo"]) == sorted(word for word in words if word.isidentifier())


def test_gradient_checkpointing_and_the_adapters_own_dropout(tmp_path):
    two = {"max_steps": 2, "logging_steps": 1, "warmup_ratio": 0.0, "learning_rate": 0.05}
    plain = fit("dpo", adapted(), tmp_path / "a", given("dpo", **two))
    settings = given("dpo", **two, gradient_checkpointing=True)
    recomputed = fit("dpo", adapted(), tmp_path / "b", settings)
    losses = [
        [line["loss"] for line in run.history if "loss" in line] for run in (plain, recomputed)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    model = adapted(lora_dropout=0.5)
    dropped = fit("dpo", model, tmp_path / "c", given("dpo", **two))
    assert dropped.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert dropped.history[1]["loss"] != pytest.approx(plain.history[1]["loss"], abs=1e-4)
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.5}
    assert model.get_base_model().model.layers[0].self_attn.attention_dropout == 0.4


def test_adapters_that_trl_would_pass_by_are_refused(tmp_path):
    model = adapted(target_modules=["q_proj", "lm_head"])
    with pytest.raises(TargetError, match="cannot train an adapter on the output head"):
        fit("dpo", model, tmp_path, given("dpo"))
    tied = tiny.llama(tied=True, vocab=text.VOCABULARY, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5])
    with pytest.raises(TargetError, match=r"leave out the embedding"):
        fit("kto", get_peft_model(tied, config), tmp_path, given("kto"))
    named = get_peft_model(adapted().unload(), config, adapter_name="x")
    with pytest.raises(AdapterNameError, match="named default; this model has x"):
        fit("dpo", named, tmp_path, given("dpo"))


def test_the_adapters_dtype_is_not_trls_to_choose(tmp_path):
    """TRL makes adapters on a base in 4 bits bfloat16, in which small steps are lost."""
    model = adapted()
    model.get_base_model().is_loaded_in_4bit = True
    fit("dpo", model, tmp_path, given("dpo", max_steps=1))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_start_that_is_taken_out_of_the_weights_leaves_the_reference_at_the_base(tmp_path):
    model = adapted(init_lora_weights="pissa")
    result = fit("dpo", model, tmp_path, given("dpo", max_steps=2))
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("task", "options", "why"),
    [
        ("dpo", {"loss_type": "sigmiod"}, "Did you mean 'sigmoid'"),
        ("dpo", {"label_smoothing": 0.1}, "label_smoothing is for loss_type exo_pair"),
        ("dpo", {"loss_type": "exo_pair"}, "needs train.label_smoothing"),
        ("dpo", {"packing": True}, "train.packing is for fine-tuning"),
        ("kto", {"method": "full"}, "weights would need a second copy"),
        ("kto", {"batch_size": 1}, "needs 2 or more"),
    ],
)
def test_settings_that_do_not_go_with_the_task(task, options, why):
    with pytest.raises(TaskSettingsError, match=why):
        prepared(task, given(task, **options))


def test_every_problem_of_the_settings_at_once():
    settings = replace(given("dpo", packing=True), data=DataSettings(loss_on="all"))
    with pytest.raises(TaskSettingsError, match=r"(?s)packing.*loss_on all"):
        prepared("dpo", settings)


def test_kto_says_how_unequal_labels_would_weigh_alike():
    train, _ = prepared("kto", given("kto"))
    good = sum(row.label for row in train.rows)
    low, high = good / (21 - good) * 3 / 4, good / (21 - good)
    assert f"train.undesirable_weight {low:.3g} to {high:.3g}" in train.summary
    balanced, _ = prepared("kto", given("kto", undesirable_weight=high * 0.9))
    assert balanced.note == ""
    few = TASKS["kto"].prepare(JUDGED[::3], TOKENIZER, given("kto"), max_length=64)
    assert "all of them are bad" in few.summary


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lowrank\[trl\]'"):
        trl_class("dpo", 0)
