from lowrank import LoraConfig, LoraModel, LoraRuntimeConfig
from lowrank.compat.absent import *  # noqa: F403

__all__ = ["LoraConfig", "LoraModel", "LoraRuntimeConfig"]
