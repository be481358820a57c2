"""`layer_replication`: stacks of layers that share the base's weights."""

import copy

import pytest
import torch
import transformers
from models import Net
from tiny import IDS, bert, bits, gpt2, llama, logits, randomise, same_bits, t5

import lowrank
from lowrank.errors import AdapterMismatchError, ConfigError, TargetError
from lowrank.expected import changes

RANGES = [[0, 2], [1, 3]]


def three(**options):
    return llama(layers=3, **options)


def adapted(base, ranges=None, targets=("q_proj", "down_proj"), **fields):
    config = lowrank.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=list(targets),
        layer_replication=ranges or RANGES,
        **fields,
    )
    return randomise(lowrank.get_peft_model(base, config))


def by_hand(model, base, order=(0, 1, 1, 2)):
    """A llama of as many layers as `order` has, with copies of the base's, and the adapter merged."""
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = len(order)
    deep = transformers.LlamaForCausalLM(config).double().eval()
    state = {k: t for k, t in base.state_dict().items() if ".layers." not in k}
    for new, old in enumerate(order):
        for key, tensor in base.model.layers[old].state_dict().items():
            state[f"model.layers.{new}.{key}"] = tensor
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, lowrank.LoraLayer):
            lora = layer.lora("default")
            name = f"{path}.weight"
            state[name] = state[name] + lora.scaling * (lora.B @ lora.A).detach()
    deep.load_state_dict(state)
    return deep


def test_a_deeper_model_with_shared_weights(tmp_path):
    base = three()
    model = adapted(three())
    assert model.config.num_hidden_layers == 4
    layers = model.get_base_model().model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    base_size = sum(p.numel() for p in base.parameters())
    trained, everything = model.get_nb_trainable_parameters()
    assert everything - trained == base_size
    assert trained == 4 * (3 * (24 + 24) + 3 * (40 + 24))
    expected = by_hand(model, base)
    torch.testing.assert_close(logits(model), logits(expected))
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(input_ids=IDS, **options), expected.generate(IDS, **options))
    assert torch.equal(
        model.generate(input_ids=IDS, **options),
        model.generate(input_ids=IDS, use_cache=False, **options),
    )


def test_saving_and_loading_replay_it(tmp_path):
    model = adapted(three())
    model.save_pretrained(tmp_path)
    config = lowrank.LoraConfig.from_pretrained(tmp_path)
    assert config.layer_replication == RANGES
    loaded = lowrank.PeftModel.from_pretrained(three(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
    file = lowrank.read_adapter(tmp_path)
    with pytest.raises(AdapterMismatchError, match="merge_and_unload"):
        list(changes(three().state_dict(), file.tensors, file.config))
    wrong = llama(layers=3, seed=5)
    start = bits(wrong)
    with pytest.raises(lowrank.LowrankError):
        lowrank.PeftModel.from_pretrained(wrong, tmp_path)
    assert same_bits(bits(wrong), start)
    assert wrong.config.num_hidden_layers == 3


def test_unload_gives_the_original_stack_back():
    base = three()
    stack, before = base.model.layers, logits(base)
    start = bits(base)
    model = adapted(base)
    model.merge_adapter()
    plain = model.unload()
    assert plain is base
    assert base.model.layers is stack
    assert base.config.num_hidden_layers == 3
    assert same_bits(bits(base), start)
    torch.testing.assert_close(logits(base), before)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(base.generate(IDS, **options), three().generate(IDS, **options))


def test_merging_gives_each_copy_its_own_weights(tmp_path):
    base = three()
    model = adapted(three())
    expected = by_hand(model, base)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(expected))
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), logits(expected))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(expected))
    pointers = [p.data_ptr() for p in merged.model.layers.parameters()]
    assert len(pointers) == len(set(pointers)) == 4 * len(list(base.model.layers[0].parameters()))
    merged.save_pretrained(tmp_path)  # refuses tensors that share memory
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(read), logits(expected))


def test_other_architectures():
    ids = torch.tensor([[1, 5, 7, 9]])
    options = {"max_new_tokens": 6, "do_sample": False}
    qwen = transformers.Qwen3Config(
        vocab_size=93,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    falcon = transformers.FalconConfig(
        vocab_size=93, hidden_size=24, num_hidden_layers=3, num_attention_heads=4
    )
    for base, target, order in (
        (gpt2(), "c_attn", [[0, 2], [0, 1]]),
        (transformers.Qwen3ForCausalLM(copy.deepcopy(qwen)).eval(), "q_proj", RANGES),
        (transformers.FalconForCausalLM(falcon).eval(), "query_key_value", RANGES),
    ):
        count = sum(end - start for start, end in order)
        model = adapted(base, order, [target])
        assert model.config.num_hidden_layers == count
        with_cache = model.generate(input_ids=ids, **options)
        assert torch.equal(with_cache, model.generate(input_ids=ids, use_cache=False, **options))
    assert adapted(transformers.Qwen3ForCausalLM(qwen), RANGES).config.layer_types == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ]
    assert (
        len(adapted(bert(), [[0, 2], [0, 2]], ["query"]).get_base_model().bert.encoder.layer) == 4
    )
    net = adapted(Net(layers=3), targets=["q_proj"])  # no configuration at all
    assert len(net.get_base_model().layers) == 4


def test_several_adapters():
    model = adapted(three())
    first = logits(model)
    same = lowrank.LoraConfig(target_modules=["v_proj"], layer_replication=[(0, 2), (1, 3)])
    model.add_adapter("b", same)
    assert len(model.get_base_model().model.layers) == 4
    torch.testing.assert_close(logits(model), first)
    other = lowrank.LoraConfig(target_modules=["v_proj"], layer_replication=[[0, 3]])
    with pytest.raises(TargetError, match=r"\[\[0, 3\]\].*stacked as \[\[0, 2\], \[1, 3\]\]"):
        model.add_adapter("c", other)
    with pytest.raises(TargetError, match="a base of its own"):
        model.add_adapter("c", lowrank.LoraConfig(target_modules=["v_proj"]))
    plain = lowrank.get_peft_model(three(), lowrank.LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(TargetError, match="a base of its own"):
        plain.add_adapter("c", other)
    torch.testing.assert_close(logits(model), first)


def test_plan_leaves_the_model_as_it_was():
    base = three()
    stack = base.model.layers
    config = lowrank.LoraConfig(target_modules=["q_proj"], layer_replication=RANGES)
    paths = [target.path for target in lowrank.plan(base, config)]
    assert paths == [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    wrong = lowrank.LoraConfig(target_modules=["nothing"], layer_replication=RANGES)
    for attempt in (lowrank.plan, lowrank.get_peft_model):
        with pytest.raises(TargetError, match="nothing"):
            attempt(base, wrong)
        assert base.model.layers is stack
        assert base.config.num_hidden_layers == 3


def test_refusals():
    for ranges in ([], [[0]], [[2, 1]], [[0, "a"]], "x", [[-1, 2]]):
        with pytest.raises(ConfigError, match="layer_replication="):
            lowrank.LoraConfig(layer_replication=ranges)

    def refused(base, ranges, target="q_proj"):
        config = lowrank.LoraConfig(target_modules=[target], layer_replication=ranges)
        with pytest.raises(TargetError) as error:
            lowrank.get_peft_model(base, config)
        return str(error.value)

    assert "[[1, 4]] are not within the 3 layers of model.layers" in refused(
        three(), [[0, 2], [1, 4]]
    )
    assert "several lists of layers (encoder.block, decoder.block)" in refused(t5(), [[0, 1]], "q")
    assert "no list" in refused(torch.nn.Sequential(torch.nn.Linear(3, 3)), [[0, 1]], "0")
