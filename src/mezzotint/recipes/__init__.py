"""Named training runs."""
