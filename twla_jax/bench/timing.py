"""Times on the device, and the two ceilings that they are held against."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROTATED_BYTES = 250e6  # several times the largest L2 cache: so much must lie between two uses of a buffer


def on_gpu() -> bool:
    """Whether kernels' times can be had from the NVIDIA profiling interface."""
    return jax.default_backend() == "gpu"


def _measured() -> bool:
    """A CPU's figures are no measurement of this kind, and are to be had soon."""
    return jax.default_backend() != "cpu"


def timer() -> str:
    """How `seconds` measures here."""
    return "kernel times by CUPTI" if on_gpu() else "wall clock"


def seconds(function: Callable[..., Any], *arguments: Any, calls: int = 3) -> float:
    """Median over calls of the device time of `function(*arguments)`, all its kernels added up, compiled before."""
    function = jax.jit(function)
    if on_gpu():
        from jax.experimental.mosaic.gpu import profiler

        _, results = profiler.measure(function, aggregate=False, iterations=calls)(*arguments)
        return statistics.median(sum(taken for _, taken in call) for call in results or []) / 1e3
    return wall_seconds(function, *arguments, calls=calls)


def wall_seconds(function: Callable[..., Any], *arguments: Any, calls: int = 3) -> float:
    """Median wall-clock time of a call, once it is compiled."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds_each(function: Callable[..., Any], make: Callable[[jax.Array], Any], size: int) -> float:
    """`seconds` of `function(*operands)`, over so many of them that none stays in a cache.

    Args:
      make: operands from a random key. All of them are each call's own: what follows from a shared one alone, XLA would
        compute once for all.
      size: bytes of those that count.
    """
    copies = int(ROTATED_BYTES / size) + 1 if _measured() else 1
    operands = [jax.jit(make)(jax.random.key(i)) for i in range(copies)]
    # Traced and lowered once, not for every copy.
    once = jax.jit(function)
    return seconds(lambda parts: [once(*part) for part in parts], operands) / copies


@functools.cache
def copy_bandwidth(*, by_clock: bool = False) -> float:
    """Bytes a second, read and written, of `2 x` on a large array; of several, one after the other, by wall clock.

    The clock is for what is timed by it, and before anything else: once CUPTI has been used, launches take longer, and
    a decode step 2 to 3 %.
    """
    x = jnp.ones(1 << (28 if _measured() else 22), jnp.float32)
    double = jax.jit(lambda x: 2 * x)
    if not by_clock:
        return 2 * x.nbytes / seconds(double, x)
    calls = 16

    def copies(x):
        for _ in range(calls):
            y = double(x)
        return y

    return 2 * x.nbytes * calls / wall_seconds(copies, x)


@functools.cache
def copy_seconds(size: int) -> float:
    """Seconds of `2 x` that reads and writes so many bytes, none of which it finds in a cache."""
    x = jax.ShapeDtypeStruct((max(size // 8, 1),), jnp.float32)
    return seconds_each(lambda x: 2 * x, lambda key: (jax.random.uniform(key, x.shape),), 4 * x.size)


@functools.cache
def product_rate(dtype: str) -> float:
    """Operations a second of XLA's own large square product, bf16 or int8."""
    size = 8192 if _measured() else 256
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size)) * 20 for key in keys)
    a, b = a.astype(dtype), b.astype(dtype)
    return 2 * size**3 / seconds(dense_product, b, a)


def dense_product(w: jax.Array, x: jax.Array) -> jax.Array:
    """`x wᵀ` by XLA: int32 of int8, else in the operands' type."""
    out = jnp.int32 if w.dtype == jnp.int8 else w.dtype
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out)
