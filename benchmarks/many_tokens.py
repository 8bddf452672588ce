"""Checks and times what kernels of sixteen and more tokens do, beside what they did before.

    python benchmarks/many_tokens.py

4-bit heads, and matrices of Qwen3-8B at 64 tokens, whose columns two blocks share or not; matrices of LLaMA-2-7B at 16
tokens, by the kernel of few tokens and in use, and at 8 and 16 tokens of 16 bits, whose two parts the kernel adds up or
XLA. Integer products must be the same; the rest is compared to 1e-4 of the largest output, or a step of bf16. What is
timed is printed at once.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from twla_jax import xla_flags
from twla_jax.bench import shapes, timing
from twla_jax.ops.integer_matmul import integer_matmul
from twla_jax.ops.ternary_matmul import gpu, gpu_many, gpu_mma
from twla_jax.ops.ternary_matmul.reference import in_two_parts
from twla_jax.ops.ternary_matmul.tile_configs import many_tile_config
from twla_jax.ops.tokens import QuantizedTokens, group_sums, wide_tokens

CLOSE = {"integers": 0.0, "floats": 1e-4, "bf16": 2**-7}  # of the largest output
BYTES = 130e6  # that pass between two uses of a buffer: twice the L2 cache


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


def compare(name: str, kernels: dict[str, Callable[..., Any]], make, close: float) -> None:
    """Check kernels against the first of them, of operands that `make` makes from a key, and time them."""
    size = shapes.bytes_of(lambda key: make(key)[0])
    made = jax.jit(make)
    operands = [made(jax.random.key(i)) for i in range(int(BYTES / size) + 1 if timing.on_gpu() else 1)]
    expected = None
    for what, kernel in kernels.items():
        try:
            y, seconds = measure(kernel, operands)
        except Exception as error:  # whatever the compiler says of tiles that do not fit
            print(f"  {what}: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        y = y.astype(jnp.float32)
        expected = y if expected is None else expected
        error = float(abs(y - expected).max() / abs(expected).max())
        verdict = "" if error <= close else "WRONG, "
        print(f"  {seconds * 1e6:7.2f} us, {verdict}error {error:.0e}: {what}", flush=True)
    print(name, flush=True)


def integers(name: str, tokens: int, n: int, m: int) -> None:
    """Compare a ternary product of int8 tokens without a split of the columns, and by the rule."""

    def make(key):
        return shapes.weight(key, n, m), shapes.tokens(key, tokens, m)

    def product(weight, x: QuantizedTokens, config):
        operands = x.codes, x.sums, x.scale, x.zero_point, weight
        return gpu_many.matmul(*operands, out_dtype=jnp.bfloat16, config=config)

    rule = many_tile_config(tokens, jax.eval_shape(make, jax.random.key(0))[0].rows)
    whole = dataclasses.replace(rule, cluster=1, split=False) if rule.split else rule
    kernels = {str(config): functools.partial(product, config=config) for config in (whole, rule)}
    compare(name, kernels, make, CLOSE["integers"])


def few(name: str, tokens: int, n: int, m: int) -> None:
    """Compare `gpu_mma`, for sixteen tokens at most, and the kernel in use, with a residual."""

    def make(key):
        residual = jax.random.normal(key, (tokens, n), jnp.bfloat16)
        return shapes.weight(key, n, m), shapes.tokens(key, tokens, m), residual

    def alone(weight, x, residual):
        y = gpu_mma.matmul(x.codes, x.scale, x.zero_point, weight, out_dtype=jnp.bfloat16)
        return weight.finished(y, residual)

    def in_use(weight, x, residual):
        operands = x.codes, x.sums, x.scale, x.zero_point, weight, residual
        return gpu.matmul(*operands, out_dtype=jnp.bfloat16)

    compare(name, {"gpu_mma": alone, "in use": in_use}, make, CLOSE["integers"])


def wide(name: str, tokens: int, n: int, m: int) -> None:
    """Compare products of tokens of 16 bits: added up by XLA, and by the kernel, in use from nine tokens on."""

    def make(key):
        x = wide_tokens(shapes.activations(key, tokens, m).astype(jnp.float32))
        return shapes.weight(key, n, m), x

    def product(weight, x: QuantizedTokens, matmul):
        parts = x.codes, x.sums, x.scale, x.zero_point
        operands = (each.reshape(2 * tokens, *each.shape[2:]) for each in parts)
        return matmul(*operands, weight, out_dtype=jnp.bfloat16)

    at_once = functools.partial(gpu_many.matmul, wide=True)
    matmuls = {"added up by XLA": in_two_parts(gpu.matmul), "at once": at_once}
    rule = many_tile_config(2 * (-(-tokens // 16) * 16), n)
    if rule.split:
        whole = dataclasses.replace(rule, cluster=1, split=False)
        matmuls["at once, columns whole"] = functools.partial(at_once, config=whole)
    kernels = {what: functools.partial(product, matmul=matmul) for what, matmul in matmuls.items()}
    compare(name, kernels, make, CLOSE["bf16"])


def head(name: str, tokens: int, n: int, m: int) -> None:
    """Compare the kernel of few tokens for an LM head of 4 bits, and the one in use."""

    def make(key):
        return shapes.head(key, n, m, 4), shapes.activations(key, tokens, m)

    kernels = {
        "few tokens": lambda weight, x: gpu.product(x, group_sums(x), weight, out_dtype=jnp.float32),
        "in use": lambda weight, x: integer_matmul(x, weight, out_dtype=jnp.float32),
    }
    compare(name, kernels, make, CLOSE["floats"])


def main() -> None:
    """Compare all."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    xla_flags.disable_triton_gemm()
    timing.copy_bandwidth()  # what is timed first takes longer
    qwen, llama = shapes.SHAPES["qwen3-8b"], shapes.SHAPES["llama-2-7b"]
    head("qwen3-8b, head, 64 tokens", 64, qwen.vocab_size, qwen.hidden_size)
    for name, (n, m) in shapes.matrices(qwen).items():
        integers(f"qwen3-8b, {name} {n}x{m}, 64 tokens", 64, n, m)
    for name, (n, m) in shapes.matrices(llama).items():
        few(f"llama-2-7b, {name} {n}x{m}, 16 tokens", 16, n, m)
        for tokens in (8, 16):
            wide(f"llama-2-7b, {name} {n}x{m}, {tokens} tokens of 16 bits", tokens, n, m)


if __name__ == "__main__":
    main()
