"""One run of a Trainer: watched, measured, stopped, resumed and saved."""
