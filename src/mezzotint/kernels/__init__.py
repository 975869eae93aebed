"""Compiled loops over raw bits, without torch dispatch."""
