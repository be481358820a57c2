"""Results as text, HTML and JSON: dataclasses in, pages out. Nothing here computes a result."""
