from lowrank.compat.absent import PromptLearningConfig
from lowrank.config import PeftConfig

__all__ = ["PeftConfig", "PromptLearningConfig"]
