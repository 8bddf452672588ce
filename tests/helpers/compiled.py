"""Counts how often a jitted function was compiled."""


def compiled_programs(function) -> int:
    """Return how many programs a jitted function holds: one for every set of shapes, dtypes and static arguments.

    JAX keeps this under a private name, which is read here and nowhere else.
    """
    return function._cache_size()
