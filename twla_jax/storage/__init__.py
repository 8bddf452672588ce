"""Reads and writes what lies on the disk: checkpoints and unfinished work; counts their bytes."""
