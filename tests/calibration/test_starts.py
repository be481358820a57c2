"""From data to a trained adapter: EVA, CorDA and LoRA-GA on whole models."""

import pytest
import tiny
import torch

from lowrank import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from lowrank.calibration.corda import preprocess_corda
from lowrank.calibration.eva import get_eva_state_dict, initialize_lora_eva_weights
from lowrank.calibration.lora_ga import GRADIENT, preprocess_loraga
from lowrank.errors import ConfigError, InitDataError
from lowrank.init import corda, lora_ga
from lowrank.wrappers import lora_layers

TARGETS = {tiny.llama: ["q_proj", "v_proj", "down_proj"], tiny.gpt2: ["c_attn", "c_proj"]}
BUILDS = list(TARGETS)
R, ALPHA = 3, 5


def config(build, init, **fields):
    fields = {"target_modules": TARGETS[build], **fields}
    return LoraConfig(r=R, lora_alpha=ALPHA, init_lora_weights=init, **fields)


def data(seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(3, 93, (9, 12))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def prepared(model, settings):
    if settings.init_lora_weights == "corda":
        preprocess_corda(model, settings, lambda: model(**data()[0]))
    else:
        preprocess_loraga(
            model,
            settings,
            lambda: model(**data()[0], labels=data()[0]["input_ids"]).loss.backward(),
        )
    return model


# --- EVA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_eva_starts_as_the_base_with_directions_in_A(build, low_cpu_mem_usage, use_rslora):
    base = tiny.logits(build())
    settings = config(build, "eva", use_rslora=use_rslora, use_dora=True, lora_dropout=0.1)
    want = get_eva_state_dict(build(), data(), settings)
    model = get_peft_model(build(), settings, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    initialize_lora_eva_weights(model, data())
    torch.testing.assert_close(tiny.logits(model), base)
    found = {p.removeprefix("base_model.model."): layer for p, layer in lora_layers(model)}
    assert list(found) == [path for path, A in want.items() if len(A)]
    scaling = ALPHA / R**0.5 if use_rslora else ALPHA / R
    for path, layer in found.items():
        lora = layer.lora("default")
        torch.testing.assert_close(lora.A, want[path])
        assert not lora.B.any()
        assert lora.scaling == pytest.approx(scaling)
        assert layer.lora_dropout["default"].p == 0.1
        assert layer.r["default"] == len(want[path])
    assert sum(layer.r["default"] for layer in found.values()) == R * len(want)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * len(found)
    model.train()
    model(**data()[0], labels=data()[0]["input_ids"]).loss.backward()


def test_layers_that_get_nothing_lose_the_adapter_and_the_file_says_so(tmp_path):
    model = tiny.llama()
    settings = config(tiny.llama, "eva")
    model = get_peft_model(model, settings)
    state = get_eva_state_dict(model, data())
    assert all(path.startswith("base_model.model.") for path in state)
    first, second, *rest = state
    state = {path: A[:R] if path in rest else A for path, A in state.items()}
    state[first] = state[first][:0]
    state[second] = torch.randn(5, 24, dtype=torch.float64)
    initialize_lora_eva_weights(model, eva_state_dict=state)
    left = model.peft_config["default"]
    name = first.removeprefix("base_model.model.")
    assert name not in left.target_modules
    assert len(left.target_modules) == len(state) - 1
    assert type(model.get_base_model().get_submodule(name)) is torch.nn.Linear
    second = second.removeprefix("base_model.model.")
    assert left.rank_pattern[second] == 5
    assert left.alpha_pattern[second] == pytest.approx(ALPHA * 5 / R)
    tiny.randomise(model).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(tiny.logits(again), tiny.logits(model))
    assert again.peft_config["default"].eva_config == settings.eva_config


def test_without_adjusting_the_scaling_follows_the_rank():
    settings = config(tiny.llama, "eva", eva_config={"adjust_scaling_factors": False})
    model = get_peft_model(tiny.llama(), settings)
    initialize_lora_eva_weights(model, data())
    for _, layer in lora_layers(model):
        assert layer.scaling["default"] == pytest.approx(ALPHA / layer.r["default"])
    assert model.peft_config["default"].alpha_pattern == {}


def test_another_adapter_of_the_layer_stays():
    model = get_peft_model(tiny.llama(), config(tiny.llama, False), "other").eval()
    with_other = tiny.logits(model)
    model.add_adapter("default", config(tiny.llama, "eva"))
    state = get_eva_state_dict(model, data())
    first = next(iter(state))
    initialize_lora_eva_weights(model, eva_state_dict={**state, first: state[first][:0]})
    torch.testing.assert_close(tiny.logits(model), with_other)
    assert list(model.get_submodule(first).r) == ["other"]


def test_an_adapter_without_values_does_nothing_unnoticed(tmp_path):
    model = get_peft_model(tiny.llama(), config(tiny.llama, "eva"))
    for act in (
        lambda: tiny.logits(model),
        lambda: model.merge_adapter(),
        lambda: model.save_pretrained(tmp_path),
        lambda: model(input_ids=tiny.IDS, adapter_names=["default", "__base__", "__base__"]),
    ):
        with pytest.raises(
            InitDataError, match=r"initialize_lora_eva_weights.model, dataloader. gi"
        ):
            act()
    with model.disable_adapter():
        torch.testing.assert_close(tiny.logits(model), tiny.logits(tiny.llama()))


def test_values_that_another_library_loads_are_values():
    """As transformers' load_adapter does: inject, then copy the file's tensors into the parameters."""
    ready = get_peft_model(tiny.llama(), config(tiny.llama, True))
    expected = tiny.logits(tiny.randomise(ready))
    model = inject_adapter_in_model(config(tiny.llama, "eva"), tiny.llama())
    tensors = ready.get_base_model().state_dict()
    model.load_state_dict({key: t for key, t in tensors.items() if ".lora_" in key}, strict=False)
    assert torch.equal(tiny.logits(model), expected)


def test_a_state_that_does_not_fit_is_refused_as_a_whole():
    model = get_peft_model(tiny.llama(), config(tiny.llama, "eva"))
    state = get_eva_state_dict(model, data())
    first, second, *_ = state
    wrong = {**state, second: torch.zeros(2, 5), "model.layers.0.mlp.dwn_proj": torch.zeros(1, 40)}
    del wrong[first]
    with pytest.raises(InitDataError) as error:
        initialize_lora_eva_weights(model, eva_state_dict=wrong)
    for text in ("3 problems", "Did you mean", "q_proj is missing", "A is (2, 5)"):
        assert text in str(error.value)
    with pytest.raises(InitDataError, match="pass a dataloader"):
        initialize_lora_eva_weights(model)
    with pytest.raises(InitDataError, match="no adapter named 'x'"):
        initialize_lora_eva_weights(model, data(), adapter_name="x")
    plain = get_peft_model(tiny.llama(), config(tiny.llama, True))
    with pytest.raises(InitDataError, match="init_lora_weights=True, not 'eva'"):
        initialize_lora_eva_weights(plain, data())


def explained(model, path, A):
    """The share of the variance of the layer's inputs that lies in the rows of A."""
    rows = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda m, args, y: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(**data()[0])
    handle.remove()
    X = rows[0] - rows[0].mean(0)
    return float((X @ A.T).square().sum() / X.square().sum())


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_peft_finds_the_same_directions_and_loads_our_file(tmp_path):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.eva import get_eva_state_dict as theirs

    settings = config(tiny.llama, "eva", eva_config={"rho": 1.0, "use_label_mask": False})
    batch = data()
    model = tiny.llama(dtype=torch.float32)
    ours = get_eva_state_dict(model, batch, settings)
    settings.save_pretrained(tmp_path / "config")
    other = peft.LoraConfig.from_pretrained(tmp_path / "config")
    found = theirs(model, batch, other, show_progress_bar=False)
    for path, A in ours.items():
        # PEFT factors by a randomised method: what counts is how much of the inputs each explains
        assert explained(model, path, A) >= 0.98 * explained(model, path, found[path].float()), path
    trained = get_peft_model(model, config(tiny.llama, "eva"))
    initialize_lora_eva_weights(trained, batch)
    tiny.randomise(trained).eval().save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny.llama(dtype=torch.float32), tmp_path / "ours")
    torch.testing.assert_close(tiny.logits(loaded.eval()), tiny.logits(trained))


# --- CorDA and LoRA-GA ----------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_the_model_starts_as_its_base_with_the_papers_factors(build, init):
    base = build()
    bits = tiny.bits(base)
    settings = config(build, init)
    prepared(base, settings)
    want = {}
    for path, module in base.named_modules():
        W = getattr(module, "weight", None)
        W = W.T if build is tiny.gpt2 and path.endswith(("c_attn", "c_proj")) else W
        if hasattr(module, "eigens"):
            want[path] = corda.factors(module.eigens, ALPHA / R)
        elif hasattr(module, GRADIENT):
            G = getattr(module, GRADIENT)
            G = G.T if build is tiny.gpt2 else G
            want[path] = lora_ga.factors(W.detach(), G, R, ALPHA / R)
    before = tiny.logits(base)
    model = get_peft_model(base, settings).eval()
    assert len(want) == 6
    for path, (A, B) in want.items():
        layer = model.get_base_model().get_submodule(path)
        torch.testing.assert_close(layer.lora_A["default"].weight, A)
        torch.testing.assert_close(layer.lora_B["default"].weight, B)
        assert not hasattr(layer.base_layer, "eigens")
        assert not hasattr(layer.base_layer, GRADIENT)
    torch.testing.assert_close(tiny.logits(model), before)
    assert tiny.same_bits(tiny.bits(model.unload()), bits)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_trained_saved_and_loaded_it_is_the_same(init, tmp_path):
    settings = config(tiny.llama, init)
    model = get_peft_model(prepared(tiny.llama(), settings), settings)
    tiny.randomise(model).eval()
    want = tiny.logits(model)
    model.save_pretrained(tmp_path / "start")
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "start")
    torch.testing.assert_close(tiny.logits(again), want)
    model.save_pretrained(tmp_path / "plain", as_plain_lora=True)
    plain = PeftModel.from_pretrained(tiny.llama(), tmp_path / "plain")
    assert plain.peft_config["default"].r == 2 * R
    torch.testing.assert_close(tiny.logits(plain), want)
    model.merge_adapter()
    torch.testing.assert_close(tiny.logits(model), want)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_without_data_the_model_stays_as_it_is(init):
    model = tiny.llama()
    with pytest.raises(InitDataError, match=f"'{init}' starts from data: run preprocess_"):
        get_peft_model(model, config(tiny.llama, init))
    assert not list(lora_layers(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_without_a_peft_model_the_start_would_not_be_saved(init):
    model = tiny.llama()
    before = tiny.bits(model)
    with pytest.raises(ConfigError, match=r"PeftModel\.from_pretrained"):
        inject_adapter_in_model(config(tiny.llama, init), model)
    assert tiny.same_bits(tiny.bits(model), before)


def test_components_of_another_rank_are_refused():
    model = prepared(tiny.llama(), config(tiny.llama, "corda"))
    settings = config(tiny.llama, "corda", rank_pattern={"v_proj": 4})
    with pytest.raises(InitDataError, match=r"v_proj: its data are for another shape or r than 4"):
        get_peft_model(model, settings)
