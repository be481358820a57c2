"""What test_hub.py runs in a process of its own, whose huggingface_hub knows the stand-in for the Hub.

Prints one JSON object: the name of each step and what came of it.
"""

import json
import sys
import time
import warnings

import torch
from torch import nn

import lowrank
from lowrank import LoraConfig, PeftModel, get_peft_model

warnings.filterwarnings("error", module="lowrank")  # huggingface_hub has its own
torch.set_num_threads(1)
results = {}


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4))


def adapted(seed, **options):
    torch.manual_seed(seed)
    return get_peft_model(base(), LoraConfig(r=3, init_lora_weights=False, **options))


def same(a, b):
    x = torch.randn(6, 7)
    return torch.equal(a(x), b(x)) and not torch.equal(a(x), base()(x))


def step(name):
    """Runs the function and keeps what it returns, or its error's class and text."""

    def run(function):
        try:
            results[name] = function()
        except Exception as error:
            results[name] = [type(error).__name__, str(error)]

    return run


model = adapted(1, target_modules=["0", "1"])
model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))


@step("push")
def _():
    info = model.push_to_hub("me/adapter", commit_message="First", private=True)
    return [info.oid, str(info.repo_url)]


@step("push again, by name alone")
def _():
    return model.push_to_hub("adapter", selected_adapters=["default"]).oid


@step("push in public")
def _():
    return bool(model.push_to_hub("me/public"))


@step("push without a right")
def _():
    model.push_to_hub("me/forbidden", token="hf_of_somebody_else")


@step("load")
def _():
    return same(PeftModel.from_pretrained(base(), "me/adapter"), model)


@step("revision")
def _():
    return same(PeftModel.from_pretrained(base(), "me/adapter", revision="main"), model)


@step("load other")
def _():
    loaded = PeftModel.from_pretrained(base(), "me/adapter")
    result = loaded.load_adapter("me/adapter", "second", subfolder="other")
    loaded.set_adapter("second")
    model.set_adapter("other")
    return [list(result), same(loaded, model)]


@step("configuration")
def _():
    return lowrank.PeftConfig.from_pretrained("me/adapter").r


@step("read_adapter")
def _():
    return sorted(lowrank.read_adapter("me/adapter").tensors)


@step("from the cache")
def _():
    return bool(PeftModel.from_pretrained(base(), "me/adapter", local_files_only=True))


@step("not in the cache")
def _():
    PeftModel.from_pretrained(base(), "me/elsewhere", local_files_only=True)


@step("missing repository")
def _():
    PeftModel.from_pretrained(base(), "me/nothing")


@step("private repository")
def _():
    PeftModel.from_pretrained(base(), "me/adapter", token=False, force_download=True)


@step("missing revision")
def _():
    PeftModel.from_pretrained(base(), "me/adapter", revision="v7")


@step("missing entry")
def _():
    PeftModel.from_pretrained(base(), "me/adapter", subfolder="nope")


@step("no adapter in it")
def _():
    PeftModel.from_pretrained(base(), "me/only-a-readme")


@step("weights missing")
def _():
    PeftModel.from_pretrained(base(), "me/no-weights")


@step("pickle")
def _():
    PeftModel.from_pretrained(base(), "me/pickle")


@step("server gone")
def _():
    from huggingface_hub import constants

    time.sleep = lambda seconds: None  # between its five retries
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    constants.HUGGINGFACE_CO_URL_TEMPLATE = template.replace(constants.ENDPOINT, sys.argv[1])
    PeftModel.from_pretrained(base(), "me/never-seen")


print(json.dumps(results))
