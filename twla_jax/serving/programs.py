"""Makes the jitted programs of an engine, and compiles them side by side."""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from twla_jax.ops.attention.kv_cache import KVCache
from twla_jax.serving import loops, slots

_COMPILERS = min(8, os.cpu_count() or 1)  # threads
# XLA makes CUDA graphs of kernels, which it brings up to date at every call. That does not pay where kernels run once.
_WITHOUT_GRAPHS = {"xla_gpu_enable_command_buffer": "", "xla_gpu_graph_min_graph_size": 2**30}


def jitted(structure: Any, room: int, of_slots: Any, of_staged: Any) -> dict[str, Any]:
    """Return the jitted programs; they take a model's leaves, as a module is slow to take apart at every step.

    Args:
      structure: of the model.
      room: the most steps of a call.
      of_slots: where the slots lie; None for one device.
      of_staged: where the row for long prompts lies.
    """

    def program(name: str, function: Callable[..., Any], *, model: bool = True, **options: Any) -> Any:
        """Return the function jitted under a name for profiles; each engine counts its own programs."""

        def run(leaves, *arguments, **named):
            return function(jax.tree.unflatten(structure, leaves) if model else leaves, *arguments, **named)

        run.__name__ = run.__qualname__ = name
        return jax.jit(run, **options)

    changing: dict[str, Any] = {"donate_argnums": 1, "out_shardings": (None, of_slots)}
    once: dict[str, Any] = {"compiler_options": _WITHOUT_GRAPHS if jax.default_backend() == "gpu" else None}
    alone: dict[str, Any] = {"model": False, "donate_argnums": 0}
    loop, fixed = functools.partial(loops.steps, room=room), ("rows", "count", "filtered")
    return {
        "read": program("read", slots.read, **changing, **once),
        "prefill": program(
            "prefill", slots.prefill, donate_argnums=5, out_shardings=(None, of_staged), **once
        ),
        "steps": program("steps", loop, static_argnames="rows", **changing),
        "fixed_steps": program("fixed_steps", loops.fixed_steps, static_argnames=fixed, **changing),
        "admit": program("admit", slots.admit, out_shardings=(None, of_slots), **alone),
        "forget": program("forget", _zeros, out_shardings=of_staged, **alone),
        "move": program("move", slots.move, out_shardings=of_slots, **alone),
    }


def _zeros(cache: KVCache) -> KVCache:
    return jax.tree.map(jnp.zeros_like, cache)


def compile_together(programs: Sequence[Callable[[], Any]]) -> None:
    """Compile programs side by side; calls with the same arguments find them.

    Args:
      programs: each returns one that is lowered, which Python does one after the other.
    """
    with concurrent.futures.ThreadPoolExecutor(_COMPILERS) as pool:
        running = [pool.submit(lower().compile) for lower in programs]
        for each in running:
            each.result()
