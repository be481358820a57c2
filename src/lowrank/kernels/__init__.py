"""Fast paths, each beside a plain reference that says what it computes."""
