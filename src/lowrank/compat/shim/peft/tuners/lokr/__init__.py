from lowrank.compat.absent import LoKrConfig, LoKrModel

__all__ = ["LoKrConfig", "LoKrModel"]
