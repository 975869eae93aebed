"""Rounding of tensors, beyond what a cast does."""
