"""Runs the measurements of a command, row by row, and notes what they were made on."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.typing import DTypeLike

from twla_jax.bench import decode, kernels, shapes, timing
from twla_jax.core.activation import BIT_CHOICES, OFF
from twla_jax.errors import TwlaError
from twla_jax.inference import execution
from twla_jax.recipe import EmbeddingSettings
from twla_jax.reports.run import environment

Part = Literal["kernels", "prefill", "decode"]
# Decoding first: see `timing.copy_bandwidth`.
PARTS: tuple[Part, ...] = ("decode", "kernels", "prefill")


def measure(
    parts: Sequence[Part],
    shape: str,
    *,
    batches: Sequence[int] = (1,),
    tokens: int = 2048,
    context: int = 512,
    steps: int = 64,
    layers: int | None = None,
    cache_dtype: DTypeLike | None = None,
    activation_bits: Sequence[int] = (16, 8, 4),
    embedding_bits: int = OFF,
    mesh: jax.sharding.Mesh | None = None,
    on_row: Callable[[str, Mapping[str, Any]], None] = lambda part, row: None,
) -> dict[str, Any]:
    """Return times on the device at hand, with random weights, all in one process.

    Args:
      parts: `kernels` times each op at few tokens, `prefill` at many, `decode` whole models' steps, which come first.
      shape: a name in `SHAPES`.
      batches: rows that decode together.
      tokens: of a prefill.
      context: tokens in the cache when decoding begins.
      steps: tokens that are timed after them.
      layers: blocks of the decoding model; all of them if None.
      cache_dtype: of the decoding model's cache; None for bf16.
      activation_bits: of the decoding models; 16 also times the kernels' products with bf16 activations.
      embedding_bits: of the ternary decoding models' embedding and LM head: 16, or 2 to 8, which also times the head
        alone.
      mesh: with an axis `model` that decoding models are split over; the other parts run on one device.
      on_row: called with the part and each row as soon as it is measured.

    Returns:
      JSON-ready: rows by part, `copy_bytes_per_second` and, for decoding, the same `by_clock`, peaks of XLA's
      products, how it was timed, and which references replaced kernels.

    Raises:
      TwlaError: an unknown shape, or a size below 1.
    """
    config = _config(shape, layers)
    for name, value in {
        "batch": min(batches, default=0),
        "tokens": tokens,
        "context": context,
        "steps": steps,
    }.items():
        if value < 1:
            raise TwlaError(f"{name} {value}: at least 1 is needed")
    if other := set(activation_bits) - {OFF, *BIT_CHOICES}:
        raise TwlaError(f"activation bits {min(other)}: must be 16, 8, 6, 4 or 2")
    if embedding_bits != OFF:
        EmbeddingSettings(bits=embedding_bits)  # raises for unknown bits
    settings = decode.DecodeSettings(
        batches=tuple(batches),
        context=context,
        steps=steps,
        cache_dtype=cache_dtype,
        activation_bits=tuple(activation_bits),
        embedding_bits=embedding_bits,
        mesh=mesh,
    )
    kinds = [
        kind
        for kind, used in (("int8", min(activation_bits) < OFF), ("bf16", OFF in activation_bits))
        if used
    ]
    makers: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "kernels": lambda: (
            row for batch in batches for row in kernels.decode_rows(config, batch, kinds, embedding_bits)
        ),
        "prefill": lambda: kernels.prefill_rows(config, tokens),
        "decode": lambda: decode.decode_rows(config, settings),
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    with _fallbacks() as fallbacks:
        for part in (each for each in PARTS if each in parts):
            rows[part] = []
            for row in makers[part]():
                rows[part].append(row)
                on_row(part, row)
    return {
        "shape": shape,
        **rows,
        "copy_bytes_per_second": timing.copy_bandwidth(),
        **(
            {"copy_bytes_per_second_by_clock": timing.copy_bandwidth(by_clock=True)}
            if "decode" in rows
            else {}
        ),
        "product_operations_per_second": {kind: timing.product_rate(kind) for kind in ("bfloat16", "int8")},
        "timer": {"kernels": timing.timer(), "prefill": timing.timer(), "decode": "wall clock"},
        "path": execution.path(),
        "fallbacks": sorted(fallbacks),
        **environment(),
    }


def _config(shape: str, layers: int | None):
    if shape not in shapes.SHAPES:
        raise TwlaError(f"shape {shape!r} is none of {', '.join(shapes.SHAPES)}")
    config = shapes.SHAPES[shape]
    if layers is None:
        return config
    if not 1 <= layers <= config.num_layers:
        raise TwlaError(f"layers {layers}: {shape} has 1 to {config.num_layers}")
    return dataclasses.replace(config, num_layers=layers)


@contextlib.contextmanager
def _fallbacks() -> Iterator[set[str]]:
    """Collect what the ops log about references that replace this platform's kernels."""
    found: set[str] = set()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if f"the {jax.default_backend()} kernel" in message:
                found.add(message)

    logger, handler = logging.getLogger("twla_jax.ops"), Collector()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
