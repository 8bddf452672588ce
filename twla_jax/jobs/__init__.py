"""Runs one command each, from files to a folder."""
