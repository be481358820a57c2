"""Packed rows: the same loss and gradients, and nothing of one row in another."""

import pytest
import tiny
import torch
import transformers

from lowrank import LoraConfig, get_peft_model
from lowrank.train.data.encode import IGNORE, pad_right
from lowrank.train.data.packing import PackingError, check_packing, collate_packed, pack
from lowrank.train.run.callbacks import Loss

LENGTHS = (7, 3, 11, 1, 5, 8, 2, 13)
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "mixtral": tiny.mixtral}


def examples(seed=0):
    """Rows of odd lengths, some of which learn everything, some only their end."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(3, 90, (length,), generator=random).tolist()
        masked = 0 if i % 3 == 0 else length // 2
        made.append({"input_ids": ids, "labels": [IGNORE] * masked + ids[masked:]})
    return made


def adapted(name, attention="sdpa", **options):
    model = MODELS[name](dtype=torch.float32)
    model.set_attn_implementation(attention)
    config = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return tiny.randomise(get_peft_model(model, config))


def gradients(model, batches):
    """Loss and gradients of a step over all `batches`, as training has them."""
    count = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in batches)
    model.zero_grad()
    loss = Loss(None)
    total = 0.0
    for batch in batches:
        labels = batch.pop("labels")
        part = loss(model(**batch), labels, num_items_in_batch=count)
        part.backward()
        total += part.item()
    return total, [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_loss_and_gradients_are_those_of_the_rows(name, attention):
    model, rows = adapted(name, attention), examples()
    packed = pack(rows, 17)
    assert 1 < len(packed) < len(rows)
    loss, wanted = gradients(model, [pad_right(0)([row]) for row in rows if len(row["labels"]) > 1])
    for flat in (False, True):
        found, got = gradients(model, [collate_packed(0, flat)(packed)])
        assert found == pytest.approx(loss, rel=1e-6)
        for one, two in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_row_never_sees_another(name):
    """Other tokens in one row: of the others, not a bit of the logits changes."""
    model, rows = adapted(name), examples()
    batch = collate_packed(0, flat=False)(pack(rows, 17))
    del batch["labels"]
    before = model(**batch).logits
    starts = (batch["position_ids"] == 0).cumsum(1)  # which row of its pack a token is of
    changed = starts[1] == 2
    assert 0 < changed.sum() < len(changed) - 3
    batch["input_ids"][1, changed] = (batch["input_ids"][1, changed] + 31) % 90
    after = model(**batch).logits
    same = ~changed
    assert torch.equal(before[1, same], after[1, same]) or name == "mixtral"
    # a mixture of experts runs each expert on its tokens together: other tokens, other rounding
    torch.testing.assert_close(before[1, same], after[1, same], rtol=0, atol=1e-5)
    assert (before[1, changed] - after[1, changed]).abs().max() > 1e-2
    assert torch.equal(before[[0, *range(2, len(before))]], after[[0, *range(2, len(before))]]) or (
        name == "mixtral"
    )


def test_every_row_is_packed_once_and_fits():
    rows = examples()
    packed = pack(rows, 13)
    assert max(len(p["input_ids"]) for p in packed) <= 13
    assert len(packed) == 4  # 50 tokens: no fewer than that will do
    found = []
    for p in packed:
        starts = [i for i, position in enumerate(p["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(p["input_ids"])], strict=True):
            assert p["position_ids"][start:end] == list(range(end - start))
            assert p["labels"][start] == IGNORE  # the row before does not predict it
            found.append((p["input_ids"][start:end], p["labels"][start + 1 : end]))
    assert sorted(found) == sorted((r["input_ids"], r["labels"][1:]) for r in rows)


def test_padding_of_packed_rows_is_a_row_of_its_own():
    packed = [pack(examples()[i : i + 1], 17)[0] for i in (0, 1)]
    batch = collate_packed(9, flat=False)(packed)
    assert batch["input_ids"].shape == (2, 7)
    assert batch["input_ids"][1, 3:].tolist() == [9] * 4
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch["labels"][1, 3:].tolist() == [IGNORE] * 4
    flat = collate_packed(9, flat=True)(packed)
    assert flat["position_ids"].tolist() == [[*range(7), *range(3)]]


@pytest.mark.parametrize("name", MODELS)
def test_models_that_keep_rows_apart_pass(name):
    check_packing(adapted(name))


def bloom():
    config = transformers.BloomConfig(vocab_size=93, hidden_size=24, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config)


def mamba():
    config = transformers.MambaConfig(
        vocab_size=93, hidden_size=24, num_hidden_layers=1, state_size=4
    )
    return transformers.MambaForCausalLM(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", [bloom, mamba])
def test_models_that_would_mix_rows_are_refused(made):
    with pytest.raises(PackingError, match=r"train\.packing: .*\n.*false"):
        check_packing(made())


def test_positions_that_count_on_are_refused():
    """Apart, but not as alone: the model takes its positions from elsewhere."""
    model = adapted("gpt2")
    wpe = model.get_base_model().transformer.wpe
    handle = wpe.register_forward_pre_hook(lambda m, a: (torch.arange(a[0].shape[1])[None],))
    with pytest.raises(PackingError, match="count on from the one before"):
        check_packing(model)
    handle.remove()


def test_an_activated_lora_is_refused():
    with pytest.raises(PackingError, match="activated LoRA"):
        check_packing(adapted("llama", alora_invocation_tokens=[5, 6]))
