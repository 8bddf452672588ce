"""Writes a quantised model in formats of other tools: exact, or refused."""
