"""Runs a finished model: packed weights, kernels, caches, generation."""
