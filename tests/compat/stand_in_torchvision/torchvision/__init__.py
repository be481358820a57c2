"""The few image transforms that diffusers' training scripts take from torchvision, which needs CUDA's torch here."""
