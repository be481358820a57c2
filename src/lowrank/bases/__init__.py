"""Base layers: how each kind of module holds its weight, and how that weight meets the input."""
