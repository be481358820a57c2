import json
import math

import pytest
import text
import tiny
import torch
from safetensors.torch import load_file
from training import FAST, ROWS, adapted, fit

from lowrank import PeftModel
from lowrank.errors import NotTrainableError
from lowrank.train.data.encode import IGNORE, encode, pad_right
from lowrank.train.evaluate import mean_loss
from lowrank.train.run.callbacks import Loss, read_log
from lowrank.train.run.checkpoints import newest_checkpoint
from lowrank.train.run.divergence import DivergedError
from lowrank.train.run.trainer import NotRecognisedError, training_arguments
from lowrank.train.settings import TrainSettings
from lowrank.train.tasks.sft import train_sft


@pytest.fixture(scope="module")
def tokenizer():
    return text.byte_tokenizer()


@pytest.fixture(scope="module")
def data(tokenizer):
    return encode(ROWS, tokenizer, max_length=64), encode(ROWS[:9], tokenizer, max_length=64)


@pytest.fixture(scope="module")
def trained(tokenizer, data, tmp_path_factory):
    model, folder = adapted(), tmp_path_factory.mktemp("run")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, fit(model, tokenizer, data, folder), folder, start


def test_it_learns_and_only_the_adapter_moves(trained):
    model, result, _, start = trained
    evals = [line["eval_loss"] for line in result.history if "eval_loss" in line]
    assert len(evals) == 2
    assert evals[-1] < evals[0] < math.log(text.VOCABULARY) + 1
    assert result.steps == 2 * math.ceil(len(ROWS) / 4)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert torch.equal(parameter, start[name]) != ("lora_" in name), name
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert result.trainable_params == count


def test_the_eval_loss_in_the_log_is_the_loss_that_evaluate_gives(trained, data):
    """Batches of unequal token counts: the Trainer's own mean of means would be another number."""
    model, result, _, _ = trained
    loss, _ = mean_loss(model, data[1].examples, 0, batch_size=3)
    assert result.history[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_checkpoints_hold_the_adapter_alone(trained):
    model, result, folder, _ = trained
    newest = newest_checkpoint(folder)
    assert newest.name == f"checkpoint-{result.steps}"
    assert not list(newest.glob("model*"))
    saved = load_file(newest / "adapter_model.safetensors")
    assert {key for key in saved if "lora_" not in key} == set()
    live = dict(model.named_parameters())
    for key, tensor in saved.items():
        assert torch.equal(tensor, live[key.replace(".weight", ".default.weight")])


def test_the_log_file_is_the_history(trained):
    _, result, folder, _ = trained
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines == result.history
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 3, 6, 9, 12]  # the first, every third, the last
    assert {"step", "epoch", "seconds", "loss", "grad_norm", "learning_rate"} == set(lines[0])


def test_the_same_seed_gives_the_same_bits(trained, tokenizer, data, tmp_path):
    again = adapted()
    fit(again, tokenizer, data, tmp_path)
    for (name, one), two in zip(trained[0].named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_resume_ends_where_the_whole_run_ended(trained, tokenizer, data, tmp_path):
    fit(adapted(), tokenizer, data, tmp_path)
    newest = newest_checkpoint(tmp_path)
    for path in newest.iterdir():  # as if the run had died after its first epoch
        path.unlink()
    newest.rmdir()
    model = adapted()
    result = fit(model, tokenizer, data, tmp_path, resume_from=newest_checkpoint(tmp_path))
    assert result.steps == trained[1].steps
    for (name, one), two in zip(trained[0].named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two), name
    logged = [line["step"] for line in result.history]
    assert logged == [line["step"] for line in trained[1].history]


def test_gradients_of_a_step_with_accumulation(tokenizer, data):
    """Two batches of unequal token counts: gradients of the mean over all tokens of both."""
    model, rows = adapted(), data[0].examples[:6]
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    batches = [pad_right(0)(rows[:2]), pad_right(0)(rows[2:])]
    count = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in batches)
    loss = Loss(None)
    for batch in batches:
        labels = batch.pop("labels")
        loss(model(**batch), labels, num_items_in_batch=count).backward()
    ours = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for example in rows:  # one at a time, in float64, without our loss
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        logits = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        for position in range(1, len(labels)):
            if labels[position] != IGNORE:
                total = total - logits[position - 1, labels[position]]
    (total / count).backward()
    theirs = [p.grad for p in model.parameters() if p.requires_grad]
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_trains_the_same(trained, tokenizer, data, tmp_path):
    model = adapted()
    settings = TrainSettings(**{**vars(FAST), "gradient_checkpointing": True})
    result = fit(model, tokenizer, data, tmp_path, settings)
    assert result.train_loss == pytest.approx(trained[1].train_loss, rel=1e-4)


def test_packing_sees_every_token_once_and_learns(trained, tokenizer, data, tmp_path):
    model = adapted()
    steps = {"packing": True, "batch_size": 2, "logging_steps": 100}
    seen = []

    def count(module, args, kwargs):
        if module.training:
            seen.append(kwargs["position_ids"])

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    result = fit(model, tokenizer, data, tmp_path, TrainSettings(**{**vars(FAST), **steps}))
    handle.remove()
    starts = sum(int((p == 0).sum()) for p in seen[: len(seen) // 2])
    assert len(ROWS) <= starts <= len(ROWS) + len(seen) // 2  # and padding, a row of its own
    assert result.steps == 2 * 6  # 22 rows, two in each of 64 tokens, two of those in a batch
    loss, _ = mean_loss(model, data[1].examples, 0, batch_size=3)
    assert result.history[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    evals = [line["eval_loss"] for line in result.history if "eval_loss" in line]
    assert evals[-1] < evals[0]


@pytest.mark.parametrize("packing", [False, True])
def test_the_longest_batch_comes_first(tokenizer, data, tmp_path, packing):
    """What does not fit into memory shows at once."""
    model, widths = adapted(), []

    def see(module, args, kwargs):
        if module.training:
            widths.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    settings = TrainSettings(**{**vars(FAST), "epochs": 1, "packing": packing, "batch_size": 2})
    fit(model, tokenizer, (data[0], None), tmp_path, settings)
    handle.remove()
    assert widths[0] == max(widths) >= data[0].longest * (1 + packing)


def test_every_weight_can_be_trained_too(tokenizer, data, tmp_path):
    model = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32)
    result = fit(model, tokenizer, data, tmp_path, TrainSettings(max_steps=3, batch_size=4))
    assert result.steps == 3
    assert result.trainable_params == result.total_params
    assert (newest_checkpoint(tmp_path) / "model.safetensors").is_file()


def test_an_adapter_loaded_for_inference_is_refused(trained, tokenizer, data, tmp_path):
    trained[0].save_pretrained(tmp_path / "adapter")
    base = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with pytest.raises(NotTrainableError, match="is_trainable=True"):
        fit(model, tokenizer, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.interop
def test_a_trainer_that_would_not_know_the_adapter_is_refused(tokenizer, data, tmp_path):
    """With PEFT installed and not replaced, whole models would be saved without a word."""
    with pytest.raises(NotRecognisedError, match="standing_in"):
        train_sft(adapted(), tokenizer, *data, tmp_path, FAST)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights(tokenizer, data, tmp_path):
    model = adapted()
    norm = model.get_base_model().model.norm

    def broken(module, inputs, output):
        return output * (math.nan if broken.calls > 9 else 1)

    broken.calls = 0
    handle = norm.register_forward_hook(
        lambda *a: (setattr(broken, "calls", broken.calls + 1), broken(*a))[1]
    )
    with pytest.raises(
        DivergedError, match=r"the loss is nan at step 10 of 12;[\s\S]*learning_rate"
    ):
        fit(model, tokenizer, (data[0], None), tmp_path)
    handle.remove()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_cut_off_line_of_the_log_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(path) == [{"step": 1}, {"step": 2}]


def test_loraplus_learns_b_faster(tokenizer, data, tmp_path):
    changed = {"max_steps": 1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    settings = TrainSettings(**{**vars(FAST), **changed, "loraplus_lr_ratio": 4.0})
    model = tiny.randomise(adapted())
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    fit(model, tokenizer, data, tmp_path, settings)
    moved = {
        n: (p.detach() - start[n]).abs().max().item()
        for n, p in model.named_parameters()
        if n in start
    }
    # AdamW's first step moves every entry by its rate
    for name, distance in moved.items():
        assert distance == pytest.approx(4e-2 if "lora_B" in name else 1e-2, rel=1e-2), name


@pytest.mark.parametrize(
    ("settings", "warmup"),
    [({}, 0.03), ({"warmup_steps": 7, "warmup_ratio": 0.5}, 7), ({"warmup_steps": 0}, 0)],
)
def test_warmup_in_steps_wins_and_a_constant_rate_has_it_too(settings, warmup, tmp_path):
    given = TrainSettings(lr_scheduler_type="constant", **settings)
    made = training_arguments(given, None, tmp_path, evaluate=False, use_cpu=True)
    assert made.warmup_steps == warmup
    assert made.lr_scheduler_type == "constant_with_warmup"
