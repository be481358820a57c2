from lowrank import LoftQConfig, LoraConfig, LoraModel, LoraRuntimeConfig
from lowrank.compat.absent import *  # noqa: F403

__all__ = ["LoftQConfig", "LoraConfig", "LoraModel", "LoraRuntimeConfig"]
