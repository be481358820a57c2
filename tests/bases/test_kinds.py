"""The table of kinds: which row a module falls into, and the names and shapes of its A and B."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import (
    BartLearnedPositionalEmbedding,
    BartScaledWordEmbedding,
)
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lowrank.bases.kinds import KINDS, TRANSPOSED, kind_of


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Subclass(nn.Linear):
    """Only another name."""


class InOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(7, 5))


MODULES = {
    "linear": [nn.Linear(7, 5), nn.Linear(7, 5, bias=False), Subclass(7, 5), FalconLinear(7, 5)],
    "Conv1D": [Conv1D(5, 7)],
    "embedding": [
        nn.Embedding(7, 5),
        nn.Embedding(7, 5, padding_idx=1),
        Gemma3TextScaledWordEmbedding(7, 5, 0, embed_scale=2.0),
        BartScaledWordEmbedding(7, 5, 0, embed_scale=2.0),
    ],
    "convolution": [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(4, 6, 1)],
    "attention in_proj": [nn.MultiheadAttention(6, 2)],
    "embedding with its own forward": [
        nn.Embedding(7, 5, max_norm=1.0),
        BartLearnedPositionalEmbedding(7, 5),
    ],
    "convolution with its own forward": [OwnConv(4, 6, 3)],
    "any module with a weight": [
        OwnLinear(7, 5),
        nn.MultiheadAttention(6, 2).out_proj,
        nn.Bilinear(3, 4, 5),
        nn.ConvTranspose2d(4, 6, 3),
        nn.EmbeddingBag(7, 5),
        InOut(),
    ],
}


@pytest.mark.parametrize(
    ("name", "module"),
    [(name, module) for name, modules in MODULES.items() for module in modules],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_the_row_of_a_module(name, module):
    kind = kind_of(module)
    assert kind is not None
    assert kind.name == name


def test_every_row_is_tried():
    assert set(MODULES) == {kind.name for kind in KINDS}


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(5),
        nn.PReLU(4),
        nn.ReLU(),
        nn.Sequential(nn.Linear(2, 2)),
        nn.LSTM(3, 4),
        nn.MultiheadAttention(6, 2, kdim=4),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.LazyLinear(4),
    ],
    ids=lambda m: type(m).__name__,
)
def test_modules_without_a_matrix_have_no_row(module):
    assert kind_of(module) is None


def test_an_integer_weight_has_no_row():
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    assert kind_of(module) is None


def test_fan_in_fan_out_is_for_modules_whose_type_does_not_say():
    assert kind_of(InOut(), fan_in_fan_out=True) is TRANSPOSED
    assert TRANSPOSED.shape(InOut()) == (5, 7)
    for modules in MODULES.values():
        for module in modules:
            if not isinstance(module, InOut | nn.EmbeddingBag):
                assert kind_of(module, fan_in_fan_out=True) is kind_of(module)


def test_torchs_own_layers_take_the_weights_of_their_parts():
    encoder = nn.TransformerEncoderLayer(6, 2)
    kind = kind_of(encoder.linear1, parent=encoder)
    assert kind.weight_taken
    assert kind.op is KINDS[0].op
    attention = nn.MultiheadAttention(6, 2)
    assert kind_of(nn.Linear(6, 6), parent=attention) is kind_of(attention.out_proj)
    assert kind_of(nn.Linear(6, 6), parent=nn.Sequential()) is KINDS[0]


@pytest.mark.parametrize(
    ("module", "A", "B", "magnitude"),
    [
        (nn.Linear(7, 5), (3, 7), (5, 3), (5,)),
        (Conv1D(5, 7), (3, 7), (5, 3), (5,)),
        (nn.Embedding(7, 5), (3, 7), (5, 3), (5,)),
        (nn.Conv1d(4, 6, 3), (3, 4, 3), (6, 3, 1), (1, 6, 1)),
        (nn.Conv2d(4, 6, (3, 2), groups=2), (3, 2, 3, 2), (6, 3, 1, 1), (1, 6, 1, 1)),
        (nn.Conv3d(4, 6, (3, 2, 1)), (3, 4, 3, 2, 1), (6, 3, 1, 1, 1), (1, 6, 1, 1, 1)),
        (nn.MultiheadAttention(6, 2), (3, 6), (18, 3), (18,)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_the_shapes_are_pefts(module, A, B, magnitude):
    kind = kind_of(module)
    weight, shape = module._parameters[kind.weight].shape, kind.shape(module)
    assert kind.layout.A_shape(weight, shape, 3) == A
    assert kind.layout.B_shape(weight, shape, 3) == B
    assert kind.layout.magnitude_shape(weight, shape) == magnitude


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))])
def test_a_copied_row_is_the_row_itself(how):
    for kind in (*KINDS, TRANSPOSED):
        assert how(kind) is kind
    taken = KINDS[0]._replace(weight_taken=True)
    assert how(taken) == taken
