from lowrank import create_loraplus_optimizer

__all__ = ["create_loraplus_optimizer"]
