from lowrank import LoftQConfig, LoraConfig, LoraLayer, LoraModel, LoraRuntimeConfig

__all__ = ["LoftQConfig", "LoraConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig"]
