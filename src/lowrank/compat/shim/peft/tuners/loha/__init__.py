from lowrank.compat.absent import LoHaConfig, LoHaModel

__all__ = ["LoHaConfig", "LoHaModel"]
