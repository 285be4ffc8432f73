"""Training loops, with their data, checkpoints and model cards."""
