"""Trains a quantised model against the original's predictions."""
