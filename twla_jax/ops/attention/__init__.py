"""Attention, its cache and its positions: what kernels and models share."""
