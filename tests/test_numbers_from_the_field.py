"""Parameter counts that papers and model cards print, exactly."""

import pytest
import torch
import transformers
from torch import nn

import lowrank
from lowrank.targets import plan


def test_five_ranks_on_a_hundred_by_a_hundred_train_a_thousand_parameters(capsys):
    model = nn.Sequential(nn.Linear(100, 100, bias=False))
    model = lowrank.get_peft_model(model, lowrank.LoraConfig(r=5, target_modules=["0"]))
    assert model.get_nb_trainable_parameters() == (1_000, 11_000)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert printed == "trainable params: 1,000 || all params: 11,000 || trainable%: 9.0909\n"


def flan_t5_large() -> transformers.T5ForConditionalGeneration:
    config = transformers.T5Config(
        vocab_size=32_128,
        d_model=1_024,
        d_kv=64,
        d_ff=2_816,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=16,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("tied", [False, True])
def test_flan_t5_large_with_rank_16_on_q_and_v(tied, capsys):
    """783,150,080 parameters, as it was trained: with an output head of its own (google/flan-t5-large's card).

    transformers 5 ties the head in code, whatever the configuration says.
    """
    model = flan_t5_large()
    embedding = model.get_input_embeddings().weight
    head = embedding if tied else nn.Parameter(torch.empty_like(embedding))
    model.lm_head.weight = head
    config = lowrank.LoraConfig(
        r=16, lora_alpha=32, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"
    )
    targets = plan(model, config)
    assert len(targets) == 2 * (24 + 24 + 24)  # self-attention twice, cross-attention once
    assert sum(t.params for t in targets) == 4_718_592
    peft_model = lowrank.get_peft_model(model, config)
    peft_model.print_trainable_parameters()
    everything, share = ("754,969,600", "0.6250") if tied else ("787,868,672", "0.5989")
    assert capsys.readouterr().out == (
        f"trainable params: 4,718,592 || all params: {everything} || trainable%: {share}\n"
    )


def test_gpt3_175b_with_rank_4_on_q_and_v():
    """18 million of 175 billion: Hu et al. 2021, §4.2 and table 4 (r_q = r_v = 4 in 96 layers, width 12,288)."""
    width, layers = 12_288, 96

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "tokens": nn.Embedding(50_257, width),
                "positions": nn.Embedding(2_048, width),
                "layers": nn.ModuleList(Attention() for _ in range(layers)),
            }
        )
    config = lowrank.LoraConfig(r=4, target_modules=["q", "v"])
    targets = plan(model, config)
    assert sum(t.params for t in targets) == 18_874_368
    assert sum(t.bytes for t in targets) == 4 * 18_874_368  # 35 MB in 16 bits, for the paper
    trainable, everything = lowrank.get_peft_model(model, config).get_nb_trainable_parameters()
    assert trainable == 18_874_368
    assert everything == pytest.approx(175e9, rel=0.01)


@pytest.mark.parametrize(
    ("r", "targets", "trainable"),
    [
        (8, ["q_proj", "v_proj"], 4_194_304),
        (16, ["q_proj", "v_proj"], 8_388_608),
        (64, ["q_proj", "k_proj", "v_proj", "o_proj"], 67_108_864),
        (16, "all-linear", 39_976_960),
    ],
)
def test_llama_7b(r, targets, trainable):
    """The counts that LoRA runs on LLaMA-7B print everywhere (4,194,304 of 6,742,609,920: alpaca-lora)."""
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=4_096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = lowrank.get_peft_model(model, lowrank.LoraConfig(r=r, target_modules=targets))
    assert model.get_nb_trainable_parameters() == (trainable, 6_738_415_616 + trainable)


def test_roberta_base_with_rank_8_on_query_and_value():
    """0.3M, as in Hu et al. 2021, table 2: 294,912 in the layers."""
    with torch.device("meta"):
        model = transformers.RobertaModel(transformers.RobertaConfig())
    targets = plan(model, lowrank.LoraConfig(r=8))
    assert sum(t.params for t in targets) == 294_912


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_line_is_pefts(method, capsys):
    peft = pytest.importorskip("peft")
    fields = {"r": 16, "target_modules": ["q", "v"], "use_dora": method == "dora"}
    lowrank.get_peft_model(
        flan_t5_large(), lowrank.LoraConfig(**fields)
    ).print_trainable_parameters()
    ours = capsys.readouterr().out
    peft.get_peft_model(flan_t5_large(), peft.LoraConfig(**fields)).print_trainable_parameters()
    assert capsys.readouterr().out == ours
