"""Rules that judge source, traces and setups."""
