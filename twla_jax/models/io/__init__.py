"""Reads models and tokenizers from the files they come in."""
