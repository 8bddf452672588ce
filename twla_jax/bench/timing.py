"""Device times of functions, and the two ceilings that they are compared with."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROTATED_BYTES = 250e6  # several times the largest L2 cache: so much must lie between two uses of a buffer


def on_gpu() -> bool:
    """Return whether the NVIDIA profiling interface can time kernels."""
    return jax.default_backend() == "gpu"


def _measured() -> bool:
    """Return False on a CPU, whose timings are placeholders and should be quick."""
    return jax.default_backend() != "cpu"


def timer() -> str:
    """Return how `seconds` measures on this device, in words."""
    return "kernel times by CUPTI" if on_gpu() else "wall clock"


def seconds(function: Callable[..., Any], *arguments: Any, calls: int = 3) -> float:
    """Return the median device time of `function(*arguments)`, all its kernels summed, compilation left out."""
    function = jax.jit(function)
    if on_gpu():
        from jax.experimental.mosaic.gpu import profiler

        _, results = profiler.measure(function, aggregate=False, iterations=calls)(*arguments)
        return statistics.median(sum(taken for _, taken in call) for call in results or []) / 1e3
    return wall_seconds(function, *arguments, calls=calls)


def wall_seconds(function: Callable[..., Any], *arguments: Any, calls: int = 3) -> float:
    """Return the median wall-clock time of a call, compilation left out."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds_each(function: Callable[..., Any], make: Callable[[jax.Array], Any], size: int) -> float:
    """Return the seconds of one `function(*operands)`, over so many operands that none stays in a cache.

    Args:
      function: what is timed.
      make: makes the operands from a random key. Each call has its own operands: XLA would compute what depends only
        on shared ones once for all calls.
      size: bytes of the operands that must not be in a cache.
    """
    copies = int(ROTATED_BYTES / size) + 1 if _measured() else 1
    operands = [jax.jit(make)(jax.random.key(i)) for i in range(copies)]
    # Traced and lowered once, not for every copy.
    once = jax.jit(function)
    return seconds(lambda parts: [once(*part) for part in parts], operands) / copies


@functools.cache
def copy_bandwidth(*, by_clock: bool = False) -> float:
    """Return bytes a second, read and written, of `2 x` on a large array; of 16 in a row, by wall clock, if `by_clock`.

    Compare what is timed by the clock with the clock's figure, and measure it first: once CUPTI has been used, launches
    take longer, and a decode step 2 to 3 %.
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
    """Return the seconds of a `2 x` that reads and writes `size` bytes, none of them in a cache."""
    x = jax.ShapeDtypeStruct((max(size // 8, 1),), jnp.float32)
    return seconds_each(lambda x: 2 * x, lambda key: (jax.random.uniform(key, x.shape),), 4 * x.size)


@functools.cache
def product_rate(dtype: str) -> float:
    """Return operations a second of XLA's own large square product, in bf16 or int8."""
    size = 8192 if _measured() else 256
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size)) * 20 for key in keys)
    a, b = a.astype(dtype), b.astype(dtype)
    return 2 * size**3 / seconds(dense_product, b, a)


def dense_product(w: jax.Array, x: jax.Array) -> jax.Array:
    """Return `x wᵀ` by XLA: int32 for int8 operands, else the operands' type."""
    out = jnp.int32 if w.dtype == jnp.int8 else w.dtype
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out)
