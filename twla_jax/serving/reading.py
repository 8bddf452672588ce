"""Says how many prompts are read in one call."""

from collections.abc import Sequence

import jax

from twla_jax.models.decoder import Decoder
from twla_jax.serving.settings import EngineSettings

_TOGETHER = 1024  # tokens of prompts that are read in one call
_MANY = 4  # times as many tokens of the shortest prompts, where there are slots for them


def prompts_together(
    settings: EngineSettings, chunks: Sequence[int], model: Decoder
) -> dict[int, tuple[int, ...]]:
    """Return how many prompts of each width a call may read beside one alone, ascending, where it may read several.

    The host takes as long to hand over a call for many prompts as for a few. So where there are slots for many, the
    shortest ones have a larger call, too.
    """
    tokens = settings.together
    if tokens is None:
        tokens = 0 if jax.default_backend() == "cpu" else _TOGETHER
    scaling = model.config.rope_scaling
    if settings.one_shape or (scaling is not None and scaling.kind == "longrope"):  # by each one's length
        tokens = 0
    times = {width: (1, _MANY) if width == chunks[0] else (1,) for width in chunks}
    counts = {
        width: {min(n * tokens // width, settings.slots) for n in each} - {0, 1}
        for width, each in times.items()
    }
    return {width: tuple(sorted(each)) for width, each in counts.items() if each}
