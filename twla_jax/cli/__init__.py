"""Holds the command line `twla`."""
