"""The three-part training step: forward, backward, update."""
