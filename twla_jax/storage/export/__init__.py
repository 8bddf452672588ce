"""Writes a quantised model in formats of other tools: as exactly as they can hold it, or refused."""
