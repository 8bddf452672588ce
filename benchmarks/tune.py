"""Times kernels with other tiles than they take: `python benchmarks/tune.py --shape llama-2-7b`.

For each matrix of the shapes, at one token, what the one-kernel linear takes by
`ops/quantized_linear/linear_tiles.py`, and the fastest of the tiles around it; with `--few`, `ternary_matmul` at one
to sixteen tokens, and `gpu_few` with others; with `--head`, heads of 4 bits at 16 tokens.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from twla_jax import xla_flags
from twla_jax.bench import shapes, timing
from twla_jax.ops.hopper.limits import BLOCK_MEMORY
from twla_jax.ops.quantized_linear import gpu, gpu_linear
from twla_jax.ops.rotate_quantize import quantizer_settings
from twla_jax.ops.ternary_matmul import gpu as ternary_gpu
from twla_jax.ops.ternary_matmul import gpu_few, ternary_matmul
from twla_jax.ops.ternary_matmul.ring_tiles import RingTileConfig
from twla_jax.ops.ternary_matmul.tile_configs import GpuTileConfig, gpu_tile_config
from twla_jax.ops.tokens import group_sums

Timed = list[tuple[float, Any]]


def around(config: RingTileConfig, columns: int) -> Iterator[RingTileConfig]:
    """Return the same tiles, and others: more warpgroups, other tiles under way, smaller copies, twice the blocks."""
    under_way = config.rows * config.warpgroups * config.stages * config.together
    for rows, warpgroups, together in itertools.product(
        {config.rows, 8 * -(-config.rows // 16)}, (2, 3, 4), {1, -(-config.together // 2), config.together}
    ):
        copies = -(-under_way // (rows * warpgroups * together))
        for stages in {copies - 1, copies, copies + 1}:
            if 1 <= stages <= -(-columns // (warpgroups * together)):
                yield RingTileConfig(rows=rows, warpgroups=warpgroups, stages=stages, together=together)


def timed(n: int, m: int, *, gated: bool) -> tuple[RingTileConfig, Timed]:
    """Return the tiles that the rule gives, and all with their seconds, fastest first, if they find room."""
    rotation, settings = shapes.rotation_for_kernels(jax.random.key(1), m, n), quantizer_settings(4, 0.9)

    def make(key):
        weight = shapes.weight(key, n, m)
        splits = (n // 2, n // 2) if gated else weight.splits
        return jax.random.normal(key, (1, m), jnp.bfloat16), dataclasses.replace(weight, splits=splits)

    x, weight = jax.eval_shape(make, jax.random.key(0))
    if reason := gpu_linear.obstacle(x, rotation, weight, gated=gated):
        raise ValueError(reason)
    _, rule = gpu_linear.launch_plan(x, rotation, weight, gated=gated)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
    found = []
    for config in {rule, *around(rule, weight.column_tiles)}:

        def linear(x, weight, config=config):
            op = functools.partial(gpu.quantized_linear, epsilon=1e-5, out_dtype=jnp.bfloat16, gated=gated)
            return op(x, rotation, settings, weight, None, None, config=config)

        try:
            found.append((timing.seconds_each(linear, make, size), config))
        except Exception as error:  # whatever the compiler says of tiles that do not fit
            print(f"  {config}: {str(error).splitlines()[0][:100]}", flush=True)
    return rule, sorted(found, key=lambda pair: pair[0])


def timed_few(tokens: int, n: int, m: int) -> tuple[float, Timed]:
    """Return the seconds of `ternary_matmul`, and of `gpu_few` by the rule and with tiles around it, fastest first."""

    def make(key):
        return shapes.weight(key, n, m), shapes.tokens(key, tokens, m)

    weight = jax.eval_shape(make, jax.random.key(0))[0]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
    now, found = timing.seconds_each(lambda weight, x: ternary_matmul(x, weight), make, size), []
    if gpu_few.obstacle(tokens, weight):
        return now, found
    rule = gpu_few.launch_plan(tokens, weight)
    for config in {rule, *around(rule, weight.column_tiles)}:

        def product(weight, x, config=config):
            return gpu_few.matmul(
                x.codes, x.scale, x.zero_point, weight, out_dtype=jnp.bfloat16, config=config
            )

        try:
            found.append((timing.seconds_each(product, make, size), config))
        except Exception as error:  # whatever the compiler says of tiles that do not fit
            print(f"  {config}: {str(error).splitlines()[0][:100]}", flush=True)
    return now, sorted(found, key=lambda pair: pair[0])


def timed_head(tokens: int, n: int, m: int) -> tuple[float, Timed]:
    """Return the seconds of a head of 4 bits by the rule and with other tiles, fastest first."""
    make = functools.partial(shapes.head, n=n, m=m, bits=4)
    size, weight = shapes.bytes_of(make), jax.eval_shape(make, jax.random.key(0))
    rule = gpu_tile_config(tokens, weight.rows, weight.column_tiles, weight.planes)
    few = sorted({16, 32, 64} & {rule.tokens, 2 * rule.tokens})

    def operands(key):
        return make(key), shapes.activations(key, tokens, m)

    found = []
    for rows, block, warpgroups, stages in itertools.product((64, 128), few, (1, 2), (1, 2, 3)):
        config = GpuTileConfig(rows=rows, tokens=block, warpgroups=warpgroups, stages=stages)
        slot = rows * 128 + 2 * (block * 256 + 4 * rows) + 8 * block
        if warpgroups * stages * slot + (warpgroups + 1) * block * rows * 4 > BLOCK_MEMORY:
            continue

        def head(weight, x, config=config):
            return ternary_gpu.product(x, group_sums(x), weight, out_dtype=jnp.float32, config=config)

        try:
            found.append((timing.seconds_each(head, operands, size), config))
            print(f"  {found[-1][0] * 1e6:.2f} us: {config}", flush=True)
        except Exception as error:  # whatever the compiler says of tiles that do not fit
            print(f"  {config}: {str(error).splitlines()[0][:100]}", flush=True)
    now = next((seconds for seconds, config in found if config == rule), float("nan"))
    return now, sorted(found, key=lambda pair: pair[0])


def _print(name: str, now: float, found: Timed) -> None:
    print(f"{name}: {now * 1e6:.2f} us", flush=True)
    for seconds, config in found[:4]:
        print(f"  {seconds * 1e6:.2f} us, {now / seconds:.3f} x: {config}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=shapes.SHAPES, action="append", required=True)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--head", action="store_true", help="only heads of 4 bits, at 16 tokens")
    options = parser.parse_args()
    xla_flags.disable_triton_gemm()
    timing.copy_bandwidth()  # what is timed first takes longer
    for shape in options.shape:
        if options.head:
            vocabulary, width = shapes.SHAPES[shape].vocab_size, shapes.SHAPES[shape].hidden_size
            _print(
                f"{shape}, head of 4 bits {vocabulary}x{width}, 16 tokens", *timed_head(16, vocabulary, width)
            )
            continue
        for name, (n, m) in shapes.matrices(shapes.SHAPES[shape]).items():
            name = f"{shape}, {name} {n}x{m}"
            if options.few:
                for tokens in (1, 4, 8, 16):
                    _print(f"{name}, {tokens} tokens", *timed_few(tokens, n, m))
                continue
            try:
                rule, found = timed(n, m, gated="gate,up" in name)
            except ValueError as error:
                print(f"{name}: {error}")
                continue
            now = next(seconds for seconds, config in found if config == rule)
            _print(f"{name} by {rule}", now, found)
