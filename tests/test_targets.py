"""What `plan` finds, and what it refuses: everything at once, with the paths and the reason."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from models import AttentionNet, ConvNet, Net
from tiny import bert, gpt2, llama, llama_classifier, t5
from torch import nn

from lowrank.config import LoraConfig
from lowrank.errors import ConfigError, TargetError
from lowrank.inject import inject
from lowrank.layer import LoraLayer
from lowrank.saved_module import ModulesToSaveWrapper
from lowrank.targets import plan, resolved, saved_modules
from lowrank.wrappers import adapter_parameters


def paths(model: nn.Module, **config) -> list[str]:
    return [target.path for target in plan(model, LoraConfig(**config))]


def refusal(model: nn.Module, **config) -> str:
    """The text of the one error that plan raises."""
    with pytest.raises(TargetError) as caught:
        plan(model, LoraConfig(**config))
    return str(caught.value)


# --- what is found --------------------------------------------------------------------------------


def test_names_are_whole_path_components_at_the_end():
    net = Net(layers=2)
    assert paths(net, target_modules=["q_proj", "layers.1.v_proj"]) == [
        "layers.0.q_proj",
        "layers.1.q_proj",
        "layers.1.v_proj",
    ]
    assert paths(net, target_modules=["head"]) == ["head"]
    with pytest.raises(TargetError):
        plan(net, LoraConfig(target_modules=["proj"]))


def test_a_string_is_a_regular_expression_for_the_whole_path():
    net = Net(layers=3)
    assert paths(net, target_modules=r"layers\.[02]\.q_proj") == [
        "layers.0.q_proj",
        "layers.2.q_proj",
    ]
    assert "no whole path" in refusal(net, target_modules="q_proj")
    assert paths(net, target_modules=r".*q_proj") == [f"layers.{i}.q_proj" for i in range(3)]


def test_exclude_modules_by_name_and_by_regular_expression():
    net = Net(layers=2)
    assert paths(net, target_modules=["q_proj"], exclude_modules=["layers.0.q_proj"]) == [
        "layers.1.q_proj"
    ]
    assert paths(net, target_modules=["q_proj", "up"], exclude_modules=r".*\.up|layers\.1.*") == [
        "layers.0.q_proj"
    ]


@pytest.mark.parametrize("layers", [1, [1], [0, 2]])
@pytest.mark.parametrize("pattern", [None, "layers", ["h", "layers"], []])
def test_layers_to_transform(layers, pattern):
    found = paths(
        Net(), target_modules=["q_proj"], layers_to_transform=layers, layers_pattern=pattern
    )
    expected = [layers] if isinstance(layers, int) else layers
    assert found == [f"layers.{i}.q_proj" for i in expected]


def test_a_path_given_whole_is_in_whatever_the_layers():
    found = paths(Net(), target_modules=["q_proj", "layers.2.up", "head"], layers_to_transform=[0])
    assert found == ["layers.0.q_proj", "layers.2.up", "head"]


def test_the_first_number_of_a_path_is_its_layer():
    """As in PEFT: of layers.1.experts.0.up, 1."""
    net = nn.Module()
    net.model = nn.Module()
    net.model.layers = nn.ModuleList(
        nn.ModuleDict(
            {"experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(3, 5)}) for _ in range(3))}
        )
        for _ in range(2)
    )
    found = paths(net, target_modules=["up"], layers_to_transform=[1])
    assert found == [f"model.layers.1.experts.{i}.up" for i in range(3)]
    found = paths(net, target_modules=["up"], layers_to_transform=[2], layers_pattern="experts")
    assert found == [f"model.layers.{i}.experts.2.up" for i in range(2)]


def test_patterns_of_rank_and_alpha():
    config = LoraConfig(
        target_modules=["q_proj", "v_proj", "head"],
        r=4,
        lora_alpha=6,
        rank_pattern={"layers.0.q_proj": 2, r"layers\.\d\.q_proj": 3, "head": 5},
        alpha_pattern={"v_proj": 1, r"^layers\.2\.q_proj": 9},
    )
    found = {t.path: (t.r, t.lora_alpha, t.scaling) for t in plan(Net(), config)}
    assert found == {
        "layers.0.q_proj": (2, 6, 3),  # the first key that matches
        "layers.0.v_proj": (4, 1, 0.25),
        "layers.1.q_proj": (3, 6, 2),
        "layers.1.v_proj": (4, 1, 0.25),
        "layers.2.q_proj": (3, 9, 3),
        "layers.2.v_proj": (4, 1, 0.25),
        "head": (5, 6, 1.2),
    }


@pytest.mark.parametrize(
    "method", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}]
)
@pytest.mark.parametrize("build", [Net, ConvNet, AttentionNet])
def test_the_counts_of_a_plan_are_those_of_the_parameters_made(build, method):
    names = {
        Net: ["q_proj", "head"] + ([] if "lora_bias" in method else ["embed"]),
        ConvNet: ["conv1", "conv2", "head"],
        AttentionNet: ["self_attn", "out_proj", "linear2"],
    }[build]
    with torch.device("meta"):
        model = build()
    config = LoraConfig(target_modules=names, r=3, **method)
    targets = plan(model, config)
    inject(model, targets, "default")
    made = [p for _, p in adapter_parameters(model)]
    assert all(p.device.type == "meta" for p in made)
    assert sum(t.params for t in targets) == sum(p.numel() for p in made)
    assert sum(t.bytes for t in targets) == sum(p.nbytes for p in made)


def test_planning_changes_nothing():
    net = Net()
    before = repr(net), {k: p.requires_grad for k, p in net.named_parameters()}
    plan(net, LoraConfig(target_modules="all-linear", modules_to_save=["embed"]))
    assert (repr(net), {k: p.requires_grad for k, p in net.named_parameters()}) == before


def test_planning_needs_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100_000, 200_000), nn.Embedding(1_000_000, 50_000))
    found = plan(model, LoraConfig(target_modules=["0", "1"], use_dora=True))
    assert [(t.out, t.in_) for t in found] == [(200_000, 100_000), (50_000, 1_000_000)]


# --- all-linear and defaults ----------------------------------------------------------------------


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def endings(found: list[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in found}


def test_all_linear_leaves_out_the_output_head():
    assert endings(paths(llama(), target_modules="all-linear")) == set(LLAMA)
    assert endings(paths(llama(tied=True), target_modules="all-linear")) == set(LLAMA)
    assert endings(paths(gpt2(), target_modules="all-linear")) == {"c_attn", "c_proj", "c_fc"}
    assert endings(paths(t5(), target_modules="all-linear")) == {*"qkvo", "wi", "wo"}
    found = paths(bert(), target_modules="all-linear")
    assert endings(found) == {"query", "key", "value", "dense"}
    assert "cls.predictions.decoder" not in found


def test_all_linear_leaves_out_the_head_that_the_task_trains_whole():
    config = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    model = llama_classifier()
    assert endings([t.path for t in plan(model, config)]) == set(LLAMA)
    assert saved_modules(model, config) == ["score"]
    # without a task type nothing says that `score` is a head
    assert "score" in paths(model, target_modules="all-linear")


def test_all_linear_of_a_model_of_ones_own_is_every_linear_layer():
    net = Net(layers=1)
    assert endings(paths(net, target_modules="all-linear")) == {
        "q_proj",
        "v_proj",
        "up",
        "down",
        "head",
    }
    assert endings(paths(AttentionNet(), target_modules="all-linear")) == {
        "out_proj",
        "linear1",
        "linear2",
        "head",
    }
    assert "no linear layer" in refusal(
        nn.Sequential(nn.Conv1d(3, 4, 1)), target_modules="all-linear"
    )


def test_without_target_modules_an_unknown_architecture_has_every_linear_layer_adapted():
    net = Net(layers=1)
    assert set(paths(net)) == set(paths(net, target_modules="all-linear"))
    assert "layers.0.up" not in paths(net, exclude_modules=["up"])


@pytest.mark.parametrize("extra", [{"task_type": "TOKEN_CLS"}, {"modules_to_save": ["classifier"]}])
def test_the_defaults_leave_out_what_is_saved_whole(extra):
    net = Net(layers=1)
    net.classifier = nn.Linear(7, 3)
    config = LoraConfig(**extra)
    targets = plan(net, config)
    assert "classifier" not in {t.path for t in targets}
    assert saved_modules(net, config) == ["classifier"]
    again = resolved(net, config, targets, ["classifier"])
    assert [t.path for t in plan(net, again)] == [t.path for t in targets]


def test_resolved_names_select_the_same_modules():
    for model in (llama(), gpt2(), t5(), bert(), Net(), AttentionNet()):
        for names in ("all-linear", None):
            config = LoraConfig(target_modules=names)
            targets = plan(model, config)
            again = resolved(model, config, targets, [])
            assert isinstance(again.target_modules, list)
            assert [t.path for t in plan(model, again)] == [t.path for t in targets]


# --- what is refused ------------------------------------------------------------------------------


def test_a_name_that_matches_nothing_names_the_nearest():
    text = refusal(llama(), target_modules=["q_proj", "v_projj"])
    assert text.startswith("target_modules: 'v_projj' matches no module; nearest: v_proj")


def test_nothing_near_lists_what_there_is():
    text = refusal(Net(), target_modules=["zzz"])
    assert "end in: down, embed, head, q_proj, up, v_proj" in text


def test_an_empty_list_is_an_error():
    assert "target_modules is empty" in refusal(Net(), target_modules=[])


@pytest.mark.parametrize("what", ["target_modules", "exclude_modules"])
def test_a_broken_regular_expression_is_an_error(what):
    text = refusal(Net(), **{"target_modules": ["q_proj"], what: "*_proj"})
    assert f"{what}='*_proj' is not a regular expression" in text
    assert text.count("not a regular expression") == 1


@pytest.mark.parametrize("what", ["rank_pattern", "alpha_pattern"])
def test_a_broken_regular_expression_in_a_pattern_is_an_error(what):
    text = refusal(Net(), target_modules=["q_proj"], **{what: {"*proj": 3}})
    assert f"{what}: '*proj' is not a regular expression" in text
    assert text.count("not a regular expression") == 1


def test_a_broken_regular_expression_for_layers_is_an_error():
    text = refusal(
        Net(), target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="(layers"
    )
    assert "layers_pattern='(layers' is not a regular expression" in text


def test_a_layer_beyond_the_model_is_an_error():
    text = refusal(Net(), target_modules=["q_proj"], layers_to_transform=[1, 3, 17])
    assert text == "layers_to_transform: [3, 17] are not layers of this model; it has 0 to 2."
    assert "[-1]" in refusal(Net(), target_modules=["q_proj"], layers_to_transform=[-1])


def test_layers_of_targets_that_have_none():
    text = refusal(Net(), target_modules=["head"], layers_to_transform=[0], layers_pattern="h")
    assert "the targeted modules have no layer number after h in their paths" in text


@pytest.mark.parametrize("what", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_key_that_hits_nothing_is_an_error(what):
    text = refusal(Net(), target_modules=["q_proj"], **{what: {"q_pro": 3}})
    assert text == f"{what}: 'q_pro' matches none of the targeted modules. Did you mean 'q_proj'?"
    # nor does one for a layer that is there but not targeted
    assert "'up'" in refusal(Net(), target_modules=["q_proj"], **{what: {"up": 3}})


def test_modules_to_save_that_match_nothing():
    text = refusal(Net(), target_modules=["q_proj"], modules_to_save=["haed"])
    assert text == "modules_to_save: 'haed' matches no module. Did you mean 'head'?"


def test_a_list_of_modules_cannot_be_saved_whole():
    text = refusal(Net(), target_modules=["head"], modules_to_save=["layers"])
    assert text == "modules_to_save: layers: ModuleList only holds others; name those in it."


def test_a_module_is_adapted_or_saved_whole():
    text = refusal(Net(), target_modules=["q_proj", "head"], modules_to_save=["head"])
    assert "'head' is in modules_to_save too" in text


def test_what_is_excluded_must_exist_and_leave_something():
    assert "exclude_modules: 'q_pro' matches no module. Did you mean 'q_proj'" in refusal(
        Net(), target_modules=["v_proj"], exclude_modules=["q_pro"]
    )
    assert "no whole path" in refusal(Net(), target_modules=["v_proj"], exclude_modules="q")
    assert "leaves nothing" in refusal(Net(), target_modules=["q_proj"], exclude_modules=["q_proj"])


def test_a_rank_set_to_zero_after_the_configuration_was_made():
    config = LoraConfig(target_modules=["q_proj"])
    config.r = 0
    with pytest.raises(TargetError, match="r=0 must be a whole number of at least 1"):
        plan(Net(), config)
    with pytest.raises(ConfigError, match="at least 1"):
        LoraConfig(r=-1)


def test_everything_comes_in_one_error():
    config = LoraConfig(
        target_modules=["q_projj", "norm", "up"],
        modules_to_save=["nothing"],
        exclude_modules=["nowhere"],
        rank_pattern={"v_proj": 3},
        alpha_pattern={"x_proj": 3},
        layers_to_transform=[7],
    )
    config.r = 0
    with pytest.raises(TargetError) as caught:
        plan(Net(), config)
    text = str(caught.value)
    for word in (
        "'q_projj'",
        "modules_to_save: 'nothing'",
        "'nowhere'",
        "r=0",
        "[7] are not layers",
    ):
        assert word in text


# --- layers that cannot carry what is asked -------------------------------------------------------


def test_a_layer_norm_is_refused_with_the_reason():
    text = refusal(Net(), target_modules=["norm"])
    assert "norm" in text
    assert "LayerNorm has a vector as its weight; train it whole with modules_to_save" in text
    assert "and 1 more" in text  # layers.0.norm, layers.1.norm, layers.2.norm and norm


def test_a_container_is_refused_with_what_is_inside():
    text = refusal(Net(), target_modules=["layers.0"])
    assert (
        "Block has no weight of its own; target a layer inside it (q_proj, v_proj, up, down, norm)"
        in text
    )


def test_attention_with_other_widths_for_keys_is_refused():
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2, kdim=4, vdim=5)})
    text = refusal(net, target_modules=["attention"])
    assert "separate weights; adapt its out_proj" in text
    assert paths(net, target_modules=["out_proj"]) == ["attention.out_proj"]


@pytest.mark.parametrize(
    ("build", "names"),
    [(AttentionNet, ["self_attn"]), (AttentionNet, ["out_proj"]), (ConvNet, ["odd"])],
)
def test_dropout_through_the_weight_is_refused(build, names):
    net = build()

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    net.odd = Odd(3, 4)
    text = refusal(net, target_modules=names, lora_dropout=0.1)
    assert "no input to drop from: set lora_dropout=0" in text


def test_an_odd_rank_with_orthogonal_is_refused():
    text = refusal(
        Net(),
        target_modules=["q_proj", "head"],
        init_lora_weights="orthogonal",
        r=4,
        rank_pattern={"head": 3},
    )
    assert text == 'head: init_lora_weights="orthogonal" needs an even r.'


def test_a_quantised_or_parametrised_weight_is_refused():
    net = Net(layers=1)
    net.head = nn.Linear(7, 5)
    net.head.weight = nn.Parameter(torch.ones(5, 7, dtype=torch.int8), requires_grad=False)
    assert "holds its weight as torch.int8" in refusal(net, target_modules=["head"])
    net.head = nn.utils.parametrizations.weight_norm(nn.Linear(7, 5))
    assert "no weight of its own" in refusal(net, target_modules=["head"])
    net.head = nn.LazyLinear(5)
    assert "head" in refusal(net, target_modules=["head"])
    assert paths(net, target_modules=["q_proj"]) == ["layers.0.q_proj"]


def test_lora_bias_where_there_is_no_bias():
    assert "an embedding has no bias" in refusal(Net(), target_modules=["embed"], lora_bias=True)
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2, bias=False)})
    assert "no bias for lora_bias" in refusal(net, target_modules=["attention"], lora_bias=True)


def test_lora_bias_needs_a_bias_of_the_weights_rows():
    net = Net()
    net.up = nn.ConvTranspose1d(4, 6, 3)
    text = refusal(net, target_modules=["up"], lora_bias=True)
    assert "lora_bias" in text
    assert "another shape" in text


def mamba(**options) -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=31,
        hidden_size=12,
        state_size=3,
        num_hidden_layers=2,
        time_step_rank=2,
        **options,
    )
    return transformers.MambaForCausalLM(config)


def test_mambas_bypassed_layers_are_refused():
    text = refusal(mamba(), target_modules=["in_proj", "out_proj", "conv1d"])
    assert "mamba passes this layer's weight to a fused kernel and never calls the layer" in text
    assert "out_proj" in text
    assert "conv1d" in text
    assert endings(paths(mamba(), target_modules=["in_proj", "x_proj"])) == {"in_proj", "x_proj"}


def test_mambas_defaults_leave_them_out():
    assert endings(paths(mamba())) == {"in_proj", "x_proj", "dt_proj"}


def test_fan_in_fan_out_does_not_turn_a_linear_layer_around():
    """Its weight is (out, in) whatever its forward; PEFT too says so."""

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    net = nn.ModuleDict({"odd": Odd(7, 5), "attention": nn.MultiheadAttention(6, 2)})
    found = plan(net, LoraConfig(target_modules=["odd", "out_proj"], fan_in_fan_out=True))
    assert [(t.out, t.in_) for t in found] == [(5, 7), (6, 6)]
    assert not any("transposed" in t.kind.name for t in found)


# --- a second adapter -----------------------------------------------------------------------------


def test_a_second_adapter_is_planned_as_if_the_first_were_not_there():
    model = llama()
    first = plan(model, LoraConfig(target_modules="all-linear"))
    inject(model, plan(model, LoraConfig(target_modules=["q_proj", "o_proj"])), "a")
    assert [t.path for t in plan(model, LoraConfig(target_modules="all-linear"))] == [
        t.path for t in first
    ]
    inject(model, plan(model, LoraConfig(target_modules=["q_proj", "up_proj"])), "b")
    assert [t.path for t in plan(model, LoraConfig())] == [
        t.path for t in first if t.path.endswith(("q_proj", "v_proj"))
    ]
    net = AttentionNet(layers=1)
    inject(net, plan(net, LoraConfig(target_modules=["self_attn"])), "a")
    targets = plan(net, LoraConfig(target_modules=["out_proj", "self_attn", "linear1"]))
    assert [t.path for t in targets] == [
        "layers.0.self_attn",
        "layers.0.self_attn.out_proj",
        "layers.0.linear1",
    ]
    inject(net, targets, "b")
    assert [list(m.r) for m in net.modules() if isinstance(m, LoraLayer)] == [
        ["a", "b"],
        ["b"],
        ["b"],
    ]


def test_saving_a_module_whole_that_has_an_adapter_in_it_is_refused():
    net = Net(layers=1)
    inject(net, plan(net, LoraConfig(target_modules=["up", "head"])), "a")
    for name in ("head", "layers.0", "layers"):
        text = refusal(
            net, target_modules=["q_proj" if name == "head" else "embed"], modules_to_save=[name]
        )
        assert "already has an adapter" in text


@pytest.mark.parametrize(
    "targets", [["head"], ["down"], "all-linear"], ids=["the module", "inside it", "all-linear"]
)
def test_adapting_a_module_that_another_adapter_saves_whole_is_refused(targets):
    net = Net(layers=1)
    config = LoraConfig(target_modules=["q_proj"])
    saved = ["layers.0.norm", "head"] if targets != ["down"] else ["layers"]
    if targets == ["down"]:
        config = LoraConfig(target_modules=["head"])
    inject(net, plan(net, config), "a", saved=saved)
    assert any(isinstance(m, ModulesToSaveWrapper) for m in net.modules())
    text = refusal(net, target_modules=targets)
    assert "saved whole by another adapter" in text


def test_all_linear_still_leaves_out_a_head_that_is_saved_whole():
    model = llama()
    inject(model, plan(model, LoraConfig()), "a", saved=["lm_head"])
    assert endings(paths(model, target_modules="all-linear")) == set(LLAMA)


# --- one module under two names -------------------------------------------------------------------


def test_a_module_under_two_names_is_one_target():
    net = Net(layers=1)
    net.again = net.head
    config = LoraConfig(target_modules=["head", "again"])
    assert [t.path for t in plan(net, config)] == ["head"]
    inject(net, plan(net, config), "default")
    assert isinstance(net.again, LoraLayer)
    assert net.again is net.head


def test_one_name_adapted_and_the_other_saved_whole_is_refused():
    net = Net(layers=1)
    net.again = net.head
    text = refusal(net, target_modules=["again"], modules_to_save=["head"])
    assert "modules_to_save" in text


# --- the same as PEFT -----------------------------------------------------------------------------

NAMES = [
    "q_proj",
    "v_proj",
    "o_proj",
    "up_proj",
    "layers.0.mlp.up_proj",
    "1.self_attn.q_proj",
    "mlp.down_proj",
]
PATTERNS = [
    "q_proj",
    r"layers\.0\..*",
    r"model\.layers\.1\.self_attn\.q_proj",
    "self_attn.o_proj",
    ".*proj",
    "^model.*v_proj",
]


@pytest.mark.interop
@given(
    fields=st.fixed_dictionaries(
        {
            "target_modules": st.lists(st.sampled_from(NAMES), min_size=1, max_size=4)
            | st.sampled_from([r".*_proj", r".*\.(q|v)_proj", r"model\.layers\.[01]\..*up_proj"]),
        },
        optional={
            "exclude_modules": st.lists(st.sampled_from(NAMES), min_size=1, max_size=2)
            | st.sampled_from([r".*\.0\..*", r".*up_proj"]),
            "layers_to_transform": st.integers(0, 1)
            | st.lists(st.integers(0, 1), min_size=1, unique=True),
            "layers_pattern": st.sampled_from(["layers", ["layers", "h"], []]),
            "modules_to_save": st.sampled_from([["mlp"], ["down_proj"], ["lm_head", "o_proj"]]),
            "rank_pattern": st.dictionaries(
                st.sampled_from(PATTERNS), st.integers(1, 9), max_size=3
            ),
            "alpha_pattern": st.dictionaries(
                st.sampled_from(PATTERNS), st.integers(1, 9), max_size=3
            ),
        },
    )
)
def test_the_modules_ranks_and_scalings_are_pefts(fields):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    try:
        config = LoraConfig(r=5, lora_alpha=3, **fields)
        found = {t.path: (t.r, t.scaling) for t in plan(LLAMA_ON_META, config)}
    except (ConfigError, TargetError):
        return
    theirs = peft.LoraConfig(r=5, lora_alpha=3, **fields)
    keys = [k for k, _ in LLAMA_ON_META.named_modules() if check_target_module_exists(theirs, k)]
    assert list(found) == keys
    for path, (r, scaling) in found.items():
        rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, path), theirs.r)
        alphas = theirs.alpha_pattern
        assert r == rank
        assert scaling == alphas.get(get_pattern_key(alphas, path), theirs.lora_alpha) / rank


with torch.device("meta"):
    LLAMA_ON_META = transformers.LlamaForCausalLM(llama().config)


@pytest.mark.parametrize(
    ("init", "targets", "r", "reason"),
    [
        ("eva", ["embed"], 2, "one gets none"),
        ("corda", ["embed"], 2, "one gets none"),
        ("eva", ["q_proj"], 8, "needs r ≤ in"),
        ("lora_ga", ["q_proj"], 4, "needs 2r ≤ out and in"),
    ],
)
def test_initialisations_from_data_are_refused_where_they_cannot_start(init, targets, r, reason):
    config = LoraConfig(r=r, target_modules=targets, init_lora_weights=init)
    with pytest.raises(TargetError, match=reason) as error:
        plan(Net(layers=1), config)
    assert "embed" in str(error.value) or "layers.0.q_proj" in str(error.value)


def test_initialisations_from_inputs_are_refused_where_no_input_is_seen():
    for init in ("eva", "corda"):
        config = LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=init)
        with pytest.raises(TargetError, match="used without calling it"):
            plan(AttentionNet(), config)
        config = LoraConfig(r=2, target_modules=["conv2"], init_lora_weights=init)
        if init == "eva":
            assert len(plan(ConvNet(), config)) == 1
        else:
            with pytest.raises(TargetError, match="groups of this convolution"):
                plan(ConvNet(), config)


class _Attention(nn.Module):
    def __init__(self, added: bool):
        super().__init__()
        self.to_q = nn.Linear(7, 5)
        self.add_k_proj = nn.Linear(7, 5) if added else None


def test_an_optional_layer_that_the_model_leaves_out_may_be_named():
    """diffusers' scripts name add_k_proj for all models, and its attention has it in some."""
    config = LoraConfig(target_modules=["to_q", "add_k_proj"])
    for added, expected in ((False, ["0.to_q"]), (True, ["0.to_q", "0.add_k_proj"])):
        model = nn.Sequential(_Attention(added))
        assert [target.path for target in plan(model, config)] == expected
    with pytest.raises(TargetError, match="'add_k_proj' matches no module"):
        plan(nn.Sequential(_Attention(False)), LoraConfig(target_modules=["add_k_proj"]))
    with pytest.raises(TargetError, match="'add_kproj' matches no module"):
        plan(nn.Sequential(_Attention(False)), LoraConfig(target_modules=["to_q", "add_kproj"]))
