"""Times functions on the device, and measures the two ceilings that they are compared with."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROTATED_BYTES = 250e6  # several times the largest L2 cache: bytes that must pass between two uses of a buffer


def on_gpu() -> bool:
    """Return whether the NVIDIA profiling interface gives kernels' times."""
    return jax.default_backend() == "gpu"


def _measured() -> bool:
    """Return False on a CPU, where timings are placeholders and should be quick."""
    return jax.default_backend() != "cpu"


def timer() -> str:
    """Return the name of how `seconds` measures here."""
    return "kernel times by CUPTI" if on_gpu() else "wall clock"


def seconds(function: Callable[..., Any], *arguments: Any, calls: int = 3) -> float:
    """Return the median device seconds of `function(*arguments)`: all its kernels added up, compiled before."""
    function = jax.jit(function)
    if on_gpu():
        from jax.experimental.mosaic.gpu import profiler

        _, results = profiler.measure(function, aggregate=False, iterations=calls)(*arguments)
        return statistics.median(sum(taken for _, taken in call) for call in results or []) / 1e3
    return wall_seconds(function, *arguments, calls=calls)


def wall_seconds(function: Callable[..., Any], *arguments: Any, calls: int = 3) -> float:
    """Return the median wall-clock seconds of a call, once it is compiled."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds_each(function: Callable[..., Any], make: Callable[[jax.Array], Any], size: int) -> float:
    """Return `seconds` of `function(*operands)`, over so many operands that none stays in a cache.

    Args:
      function: of the operands.
      make: operands from a random key; all are of one call, as XLA would compute once what follows from a shared one.
      size: bytes of the operands that count.
    """
    copies = int(ROTATED_BYTES / size) + 1 if _measured() else 1
    operands = [jax.jit(make)(jax.random.key(i)) for i in range(copies)]
    # Trace and lower once, not for every copy.
    once = jax.jit(function)
    return seconds(lambda parts: [once(*part) for part in parts], operands) / copies


@functools.cache
def copy_bandwidth(*, by_clock: bool = False) -> float:
    """Return the bytes a second, read and written, of `2 x` on a large array.

    With `by_clock` it is several of them, one after the other, by wall clock. That is for what is timed by the clock,
    and comes before anything else: once CUPTI has been used, launches take longer, and a decode step 2 to 3 %.
    """
    x = jnp.ones(1 << (28 if _measured() else 22), jnp.float32)
    double = jax.jit(lambda x: 2 * x)
    if not by_clock:
        return 2 * x.nbytes / seconds(double, x)
    calls = 16

    def copies(x):
        for _ in range(calls - 1):
            double(x)
        return double(x)

    return 2 * x.nbytes * calls / wall_seconds(copies, x)


@functools.cache
def copy_seconds(size: int) -> float:
    """Return the seconds of `2 x` that reads and writes `size` bytes, none of which it finds in a cache."""
    x = jax.ShapeDtypeStruct((max(size // 8, 1),), jnp.float32)
    return seconds_each(lambda x: 2 * x, lambda key: (jax.random.uniform(key, x.shape),), 4 * x.size)


@functools.cache
def product_rate(dtype: str) -> float:
    """Return the operations a second of XLA's own large square product, bf16 or int8."""
    size = 8192 if _measured() else 256
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size)) * 20 for key in keys)
    a, b = a.astype(dtype), b.astype(dtype)
    return 2 * size**3 / seconds(dense_product, b, a)


def dense_product(w: jax.Array, x: jax.Array) -> jax.Array:
    """Return `x wᵀ` by XLA: int32 for int8, else in the operands' dtype."""
    out = jnp.int32 if w.dtype == jnp.int8 else w.dtype
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out)
