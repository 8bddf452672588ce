"""Checks and times kernels for sixteen and more tokens, with the tiles they take and with others.

    python benchmarks/many_tokens.py

Matrices of Qwen3-8B at 64 tokens and of LLaMA-2-7B at 16 tokens of 16 bits, and 4-bit heads at 64 and 16. Integer
products are compared with those by the rule, which must be the same; heads with the reference's, to 1e-4 of the
largest. What is timed is printed at once, the fastest of each last.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from twla_jax import xla_flags
from twla_jax.bench import shapes, timing
from twla_jax.ops.integer_matmul import integer_matmul
from twla_jax.ops.ternary_matmul import gpu_few, gpu_many, gpu_many_floats, reference, ternary_matmul
from twla_jax.ops.ternary_matmul.tile_configs import ManyTileConfig, many_tile_config
from twla_jax.ops.tokens import QuantizedTokens, group_sums, wide_tokens

CLOSE = 1e-4  # of the largest output, in float32
BF16 = 2**-7  # the same in bf16, where numbers on two sides of an edge are rounded


def compare(name: str, kernels: dict[str, Callable[..., Any]], make, size: int, close: float) -> None:
    """Check kernels of the operands of `make` against the first of them, and time them."""
    operands = jax.jit(make)(jax.random.key(0))
    expected, found = None, []
    for what, kernel in kernels.items():
        try:
            y = jax.jit(kernel)(*operands).astype(jnp.float32)
            expected = y if expected is None else expected
            error = float(abs(y - expected).max() / abs(expected).max())
            seconds = timing.seconds_each(kernel, make, size)
        except Exception as error:  # whatever the compiler says of tiles that do not fit
            print(f"  {what}: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        verdict = f"error {error:.0e}" if error <= close else f"WRONG, error {error:.0e}"
        print(f"  {seconds * 1e6:7.2f} us, {verdict}: {what}", flush=True)
        found.append((seconds, what))
    if found:
        print(f"{name}: {found[0][0] * 1e6:.2f} us, {min(found)[0] * 1e6:.2f} by {min(found)[1]}", flush=True)


def others(rule: ManyTileConfig, tiles: int) -> Iterator[ManyTileConfig]:
    """Yield other tiles than the rule's: more warpgroups, and clusters that share the columns."""
    few, change = rule.tokens <= 32, functools.partial(dataclasses.replace, rule, cluster=1, stages=2)
    more = {"x_slots": 3, "x_planes": 2 if few else 1}
    yield change(lines=4, warpgroups=4, **more)
    yield change(lines=3, warpgroups=3, x_slots=2, x_planes=2)
    yield change(lines=2, cluster=2, stages=3, x_slots=4 if few else 2, x_planes=4, split=True)
    yield change(lines=4, warpgroups=4, cluster=2, split=True, **(more if few else more | {"x_slots": 2}))
    for cluster in (2, 3):
        slots = min(-(-tiles // cluster), 4 if cluster == 2 else 3)
        yield change(lines=1, cluster=cluster, stages=3, x_slots=slots, x_planes=4, split=True)


def short(config: ManyTileConfig) -> str:
    """Return what distinguishes the tiles."""
    split = f", columns over {config.cluster} blocks" if config.split else f", cluster {config.cluster}"
    ring = f"{config.stages} stages, {config.x_slots} x {config.x_planes} planes"
    return f"{config.lines} of {config.warpgroups} warpgroups a line{split}, {ring}"


def integers(tokens: int, n: int, m: int, name: str) -> None:
    """Compare the tiles of a ternary product of int8 tokens."""

    def make(key):
        return shapes.weight(key, n, m), shapes.tokens(key, tokens, m)

    def product(weight, x: QuantizedTokens, config):
        operands = x.codes, x.sums, x.scale, x.zero_point, weight
        return gpu_many.matmul(*operands, out_dtype=jnp.bfloat16, config=config)

    weight = jax.eval_shape(make, jax.random.key(0))[0]
    rule = many_tile_config(tokens, weight.rows)
    kernels: dict[str, Any] = {f"rule: {short(rule)}": functools.partial(product, config=rule)}
    if tokens <= 16:
        kernels = {"few tokens": lambda weight, x: ternary_matmul(x, weight)} | kernels
    for config in others(rule, weight.column_tiles):
        kernels[short(config)] = functools.partial(product, config=config)
    compare(
        name,
        kernels,
        make,
        shapes.bytes_of(lambda key: make(key)[0]),
        0 if tokens > 16 else BF16,
    )


def wide(tokens: int, n: int, m: int, name: str) -> None:
    """Compare products of tokens of 16 bits: added up by XLA, and by the kernel."""

    def make(key):
        x = wide_tokens(shapes.activations(key, tokens, m).astype(jnp.float32))
        return shapes.weight(key, n, m), x

    def at_once(weight, x: QuantizedTokens, config=None):
        codes, scale, zero_point = (
            each.reshape(2 * tokens, *each.shape[2:]) for each in (x.codes, x.scale, x.zero_point)
        )
        options = {"out_dtype": jnp.bfloat16, "wide": True}
        if 2 * tokens <= 16:
            return gpu_few.matmul(codes, scale, zero_point, weight, **options)
        sums = group_sums(codes)
        return gpu_many.matmul(codes, sums, scale, zero_point, weight, config=config, **options)

    weight = jax.eval_shape(make, jax.random.key(0))[0]
    kernels: dict[str, Any] = {"added up by XLA": lambda weight, x: ternary_matmul(x, weight)}
    kernels["at once"] = at_once
    if 2 * tokens > 16:
        for config in others(many_tile_config(2 * tokens, weight.rows), weight.column_tiles):
            kernels[f"at once, {short(config)}"] = functools.partial(at_once, config=config)
    compare(name, kernels, make, shapes.bytes_of(lambda key: make(key)[0]), BF16)


def head(tokens: int, n: int, m: int, name: str) -> None:
    """Compare the reference, the kernel in use and the one on tensor cores of an LM head of 4 bits."""

    def make(key):
        return shapes.head(key, n, m, 4), shapes.activations(key, tokens, m)

    def many(weight, x, config):
        return gpu_many_floats.product(x, weight, out_dtype=jnp.float32, config=config)

    kernels: dict[str, Any] = {
        "reference": lambda weight, x: reference.product(x, group_sums(x), weight),
        "in use": lambda weight, x: integer_matmul(x, weight, out_dtype=jnp.float32),
    }
    rule = gpu_many_floats.tile_config(tokens)
    for cluster, stages, slots in ((2, 3, 3), (1, 3, 3), (4, 3, 3), (2, 2, 2)):
        config = dataclasses.replace(rule, cluster=cluster, stages=stages, x_slots=slots)
        kernels[f"many: {short(config)}"] = functools.partial(many, config=config)
    compare(name, kernels, make, shapes.bytes_of(lambda key: make(key)[0]), CLOSE)


def main() -> None:
    """Compare what was asked for, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("head", "matrices", "wide", "sizes", "few"), action="append")
    asked = parser.parse_args().only or ["head", "matrices", "wide", "sizes", "few"]
    xla_flags.disable_triton_gemm()
    timing.copy_bandwidth()  # what is timed first takes longer
    qwen, llama = shapes.SHAPES["qwen3-8b"], shapes.SHAPES["llama-2-7b"]
    if "head" in asked:
        for tokens in (64, 16):
            head(tokens, qwen.vocab_size, qwen.hidden_size, f"Qwen3-8B, head, {tokens} tokens")
    if "matrices" in asked:
        for name, (n, m) in shapes.matrices(qwen).items():
            integers(64, n, m, f"Qwen3-8B, {name}, 64 tokens")
    if "wide" in asked:
        for tokens in (16, 8):
            for name, (n, m) in shapes.matrices(llama).items():
                wide(tokens, n, m, f"LLaMA-2-7B, {name}, {tokens} tokens of 16 bits")
    if "sizes" in asked:
        for tokens in (32, 96, 128):
            integers(tokens, 4096, 12288, f"Qwen3-8B, down, {tokens} tokens")
    if "few" in asked:
        for name, (n, m) in shapes.matrices(llama).items():
            integers(16, n, m, f"LLaMA-2-7B, {name}, 16 tokens")


if __name__ == "__main__":
    main()
