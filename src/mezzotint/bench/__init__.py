"""How fast the operations of a training step are in each number format, honestly timed."""
