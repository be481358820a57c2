from lowrank import LoraConfig, LoraLayer, LoraModel, LoraRuntimeConfig

__all__ = ["LoraConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig"]
