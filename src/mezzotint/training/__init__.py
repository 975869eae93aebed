"""A whole training run: configuration, loop, metrics and checkpoints."""
