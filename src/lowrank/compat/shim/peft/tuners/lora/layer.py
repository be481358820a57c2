from lowrank import LoraLayer

__all__ = ["LoraLayer"]
