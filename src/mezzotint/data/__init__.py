"""Training text: sources, tokenizers, token files and deterministic batches."""
