"""The command line `twla`."""
