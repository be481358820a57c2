from lowrank import PeftType, TaskType

__all__ = ["PeftType", "TaskType"]
