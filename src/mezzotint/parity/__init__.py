"""The proof, pure: designs, statistics, verdicts. It runs nothing."""
