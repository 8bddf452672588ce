"""Holds attention, its cache and its positions, which kernels and models share."""
