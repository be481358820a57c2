"""Running data through a model to find start values: EVA's directions, CorDA's covariances, LoRA-GA's gradients."""
