from lowrank import LoraModel

__all__ = ["LoraModel"]
