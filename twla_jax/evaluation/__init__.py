"""Measures how well a model predicts text."""
