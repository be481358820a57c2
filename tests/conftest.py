"""What every test starts from: one thread, the same random numbers, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread only costs, and xdist uses the other core

hypothesis.settings.register_profile(
    "lowrank", deadline=None, derandomize=True, max_examples=60, database=None
)
hypothesis.settings.load_profile("lowrank")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
