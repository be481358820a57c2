from lowrank.compat.absent import LoHaLayer

__all__ = ["LoHaLayer"]
