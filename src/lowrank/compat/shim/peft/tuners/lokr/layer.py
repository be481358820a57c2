from lowrank.compat.absent import LoKrLayer, factorization

__all__ = ["LoKrLayer", "factorization"]
