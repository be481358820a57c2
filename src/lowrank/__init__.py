"""LoRA, from plan to proof."""

__version__ = "0.1.0"
