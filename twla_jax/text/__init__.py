"""Turns calibration and evaluation text into windows of tokens."""
