"""Quantises a whole model, block by block."""
