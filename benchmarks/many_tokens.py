"""Checks and times kernels for sixteen and more tokens, with the tiles they take and with others.

    python benchmarks/many_tokens.py

4-bit heads and matrices of Qwen3-8B at 64 tokens, then a decode step with the fastest; matrices of LLaMA-2-7B at 16
tokens of 16 bits, then a step. Integer products must be those by the rule; heads and tokens of 16 bits are compared
to 1e-4 of the largest output, or a step of bf16. What is timed is printed at once.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from twla_jax import xla_flags
from twla_jax.bench import decode, shapes, timing
from twla_jax.ops.integer_matmul import integer_matmul
from twla_jax.ops.ternary_matmul import gpu, gpu_many, gpu_many_floats, tile_configs
from twla_jax.ops.ternary_matmul.reference import in_two_parts
from twla_jax.ops.ternary_matmul.tile_configs import ManyTileConfig
from twla_jax.ops.tokens import QuantizedTokens, wide_tokens

CLOSE = {"integers": 0.0, "floats": 1e-4, "bf16": 2**-7}  # of the largest output
BYTES = 130e6  # that pass between two uses of a buffer: twice the L2 cache
START = time.perf_counter()
Found = dict[ManyTileConfig | str, float]


def measure(kernel: Callable[..., Any], operands: list[Any]) -> tuple[jax.Array, float]:
    """Return the output of the first operands, and the device seconds of one call."""
    once = jax.jit(kernel)
    run = jax.jit(lambda parts: [once(*part) for part in parts])
    if not timing.on_gpu():
        return run(operands)[0], timing.wall_seconds(run, operands) / len(operands)
    from jax.experimental.mosaic.gpu import profiler

    outputs, calls = profiler.measure(run, aggregate=False, iterations=3)(operands)
    taken = statistics.median(sum(each for _, each in call) for call in calls or []) / 1e3
    return outputs[0], taken / len(operands)


def compare(name: str, kernels: dict[Any, Callable[..., Any]], make, close: float) -> Found:
    """Return the seconds of kernels that agree with the first of them, of operands that `make` makes from a key."""
    size = shapes.bytes_of(lambda key: make(key)[0])
    made = jax.jit(make)
    operands = [made(jax.random.key(i)) for i in range(int(BYTES / size) + 1 if timing.on_gpu() else 1)]
    expected, found = None, {}
    for what, kernel in kernels.items():
        shown = short(what) if isinstance(what, ManyTileConfig) else what
        try:
            y, seconds = measure(kernel, operands)
        except Exception as error:  # whatever the compiler says of tiles that do not fit
            print(f"  {shown}: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        y = y.astype(jnp.float32)
        expected = y if expected is None else expected
        error = float(abs(y - expected).max() / abs(expected).max())
        right = error <= close
        print(
            f"  {seconds * 1e6:7.2f} us, {'' if right else 'WRONG, '}error {error:.0e}: {shown}", flush=True
        )
        if right:
            found[what] = seconds
    print(f"{name}, after {time.perf_counter() - START:.0f} s", flush=True)
    return found


def others(rule: ManyTileConfig, tiles: int, *, rows: int) -> list[ManyTileConfig]:
    """Return other tiles than the rule's: four warpgroups, and clusters that share the columns."""
    few, change = rule.tokens <= 32, functools.partial(dataclasses.replace, rule, cluster=1, stages=2)
    four = {"lines": 4, "warpgroups": 4, "x_planes": 2 if few else 1}
    both = change(cluster=2, split=True, x_slots=3 if few else 2, **four)
    two = change(lines=2, cluster=2, stages=3, x_slots=4 if few else 2, x_planes=4, split=True)
    slots = min(-(-tiles // 2), 4)
    stays = change(lines=1, cluster=2, stages=3, x_slots=slots, x_planes=4, split=True)
    alone = change(x_slots=3, **four)
    return [alone, two, both] if rows <= 4096 else [alone, stays]


def short(config: ManyTileConfig) -> str:
    """Return what distinguishes the tiles."""
    split = f", columns over {config.cluster} blocks" if config.split else f", cluster {config.cluster}"
    ring = f"{config.stages} stages, {config.x_slots} x {config.x_planes} planes"
    return f"{config.lines} lines of {config.warpgroups} warpgroups{split}, {ring}"


def integers(name: str, tokens: int, n: int, m: int) -> Found:
    """Compare the tiles of a ternary product of int8 tokens, the rule's first."""

    def make(key):
        return shapes.weight(key, n, m), shapes.tokens(key, tokens, m)

    def product(weight, x: QuantizedTokens, config):
        operands = x.codes, x.sums, x.scale, x.zero_point, weight
        return gpu_many.matmul(*operands, out_dtype=jnp.bfloat16, config=config)

    weight = jax.eval_shape(make, jax.random.key(0))[0]
    rule = tile_configs.many_tile_config(tokens, weight.rows)
    configs = [rule, *others(rule, weight.column_tiles, rows=weight.rows)]
    kernels = {config: functools.partial(product, config=config) for config in configs}
    return compare(name, kernels, make, CLOSE["integers"])


def wide(name: str, tokens: int, n: int, m: int, *, tiles: bool = True) -> Found:
    """Compare products of tokens of 16 bits: added up by XLA, and by the kernel, with other tiles too if asked."""

    def make(key):
        x = wide_tokens(shapes.activations(key, tokens, m).astype(jnp.float32))
        return shapes.weight(key, n, m), x

    def product(weight, x: QuantizedTokens, matmul):
        parts = x.codes, x.sums, x.scale, x.zero_point
        operands = (each.reshape(2 * tokens, *each.shape[2:]) for each in parts)
        return matmul(*operands, weight, out_dtype=jnp.bfloat16)

    weight = jax.eval_shape(make, jax.random.key(0))[0]
    kernels: dict[Any, Any] = {
        "added up by XLA": in_two_parts(gpu.matmul),
        "at once": functools.partial(gpu.wide_matmul, at_once=True),
    }
    if tiles and 2 * tokens > 16:
        rule = tile_configs.many_tile_config(2 * tokens, weight.rows)
        for config in others(rule, weight.column_tiles, rows=weight.rows):
            kernels[config] = functools.partial(gpu_many.matmul, wide=True, config=config)
    kernels = {what: functools.partial(product, matmul=matmul) for what, matmul in kernels.items()}
    return compare(name, kernels, make, CLOSE["bf16"])


def head(name: str, tokens: int, n: int, m: int) -> Found:
    """Compare the kernel in use for an LM head of 4 bits with others."""

    def make(key):
        return shapes.head(key, n, m, 4), shapes.activations(key, tokens, m)

    def many(weight, x, config):
        return gpu_many_floats.product(x, weight, out_dtype=jnp.float32, config=config)

    kernels: dict[Any, Any] = {"in use": lambda weight, x: integer_matmul(x, weight, out_dtype=jnp.float32)}
    for cluster in (2, 1):
        config = dataclasses.replace(gpu_many_floats.tile_config(tokens), cluster=cluster)
        kernels[config] = functools.partial(many, config=config)
    return compare(name, kernels, make, CLOSE["floats"])


def best(found: list[Found]) -> ManyTileConfig | None:
    """Return the config with the least sum of times, if all have it."""
    common = [
        config
        for config in found[0]
        if isinstance(config, ManyTileConfig) and all(config in each for each in found)
    ]
    return min(common, key=lambda config: sum(each[config] for each in found), default=None)


def step(shape: str, sequences: int, bits: int, cache_dtype, fastest, *, of_head: bool) -> None:
    """Print the time of a decode step whose products take these tiles, by rows, and the head that was found faster."""
    rule, before, wide_before = tile_configs.many_tile_config, gpu.product, gpu.wide_matmul
    codes = sequences if bits < 16 else 2 * sequences

    def chosen(tokens, rows):
        return (tokens == codes and fastest.get(rows)) or rule(tokens, rows)

    def product(x, sums, weight, *arguments, **options):
        if weight.bits == 4 and not arguments and gpu_many_floats.obstacle(weight) is None:
            return gpu_many_floats.product(x, weight, out_dtype=options["out_dtype"])
        return before(x, sums, weight, *arguments, **options)

    tile_configs.many_tile_config = chosen
    gpu.wide_matmul = functools.partial(wide_before, at_once=True)
    gpu.product = product if of_head else before
    jax.clear_caches()
    config = shapes.SHAPES[shape]
    model = shapes.random_decoder(config, activation_bits=bits, embedding_bits=4)
    taken = decode.step_seconds(model, sequences, decode.DecodeSettings(cache_dtype=cache_dtype))
    del model
    print(
        f"{shape}, {sequences} sequences, A{bits}: {taken * 1e6:.0f} us a step,"
        f" {sequences / taken:.0f} tokens/s, after {time.perf_counter() - START:.0f} s",
        flush=True,
    )
    tile_configs.many_tile_config, gpu.product, gpu.wide_matmul = rule, before, wide_before


def main() -> None:
    """Compare all, and time steps."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    xla_flags.disable_triton_gemm()
    timing.copy_bandwidth()  # what is timed first takes longer
    shape, tokens = "qwen3-8b", 64
    config = shapes.SHAPES[shape]
    found = head(f"{shape}, head, {tokens} tokens", tokens, config.vocab_size, config.hidden_size)
    faster = found.get(gpu_many_floats.tile_config(tokens), 1) < found.get("in use", 1)
    of_rows: dict[int, list[Found]] = {}
    for name, (n, m) in shapes.matrices(config).items():
        found = integers(f"{shape}, {name} {n}x{m}, {tokens} tokens", tokens, n, m)
        of_rows.setdefault(n, []).append(found)
    fastest = {n: best(found) for n, found in of_rows.items()}
    step(shape, tokens, 4, jnp.int8, fastest, of_head=faster)
    shape, tokens = "llama-2-7b", 16
    sizes = shapes.matrices(shapes.SHAPES[shape])
    wide(f"{shape}, down, {tokens} tokens of 16 bits", tokens, *sizes["down"], tiles=False)
    step(shape, tokens, 16, None, {}, of_head=faster)
    for name, (n, m) in sizes.items():
        wide(f"{shape}, {name} {n}x{m}, {tokens} tokens of 16 bits", tokens, n, m)
    wide(f"{shape}, down, 8 tokens of 16 bits", 8, *sizes["down"])
    config = shapes.SHAPES["qwen3-8b"]
    head(f"qwen3-8b, head, {tokens} tokens", tokens, config.vocab_size, config.hidden_size)


if __name__ == "__main__":
    main()
