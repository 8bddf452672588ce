"""The method: arrays in, arrays out. No Flax, no files, no models."""
