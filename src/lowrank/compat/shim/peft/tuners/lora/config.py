from lowrank import LoraConfig, LoraRuntimeConfig

__all__ = ["LoraConfig", "LoraRuntimeConfig"]
