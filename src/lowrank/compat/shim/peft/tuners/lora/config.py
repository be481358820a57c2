from lowrank import LoftQConfig, LoraConfig, LoraRuntimeConfig

__all__ = ["LoftQConfig", "LoraConfig", "LoraRuntimeConfig"]
