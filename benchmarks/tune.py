"""Times of the one-kernel linear with other tiles than it takes: `python benchmarks/tune.py --shape llama-2-7b`.

For each matrix of the shapes, at one token, what the rule of `ops/quantized_linear/tiles.py` takes, and the fastest of
the tiles around it.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from twla_jax.benchmark import shapes, timing
from twla_jax.ops.quantized_linear import gpu
from twla_jax.ops.quantized_linear.tiles import Tiles
from twla_jax.ops.rotate_quantize import quantizer_settings

Timed = list[tuple[float, Tiles]]


def around(tiles: Tiles, columns: int) -> Iterator[Tiles]:
    """The same tiles, and others: more warpgroups, other tiles under way, smaller copies, twice the blocks."""
    under_way = tiles.rows * tiles.warpgroups * tiles.stages * tiles.together
    for rows, warpgroups, together in itertools.product(
        {tiles.rows, 8 * -(-tiles.rows // 16)}, (2, 3, 4), {1, -(-tiles.together // 2), tiles.together}
    ):
        copies = -(-under_way // (rows * warpgroups * together))
        for stages in {copies - 1, copies, copies + 1}:
            if 1 <= stages <= -(-columns // (warpgroups * together)):
                yield Tiles(rows=rows, warpgroups=warpgroups, stages=stages, together=together)


def timed(n: int, m: int, *, gated: bool) -> tuple[Tiles, Timed]:
    """The tiles that the rule gives, and all with their seconds, fastest first; without those that find no room."""
    rotation, settings = shapes.rotation_for_kernels(jax.random.key(1), m, n), quantizer_settings(4, 0.9)

    def make(key):
        weight = shapes.weight(key, n, m)
        splits = (n // 2, n // 2) if gated else weight.splits
        return jax.random.normal(key, (1, m), jnp.bfloat16), dataclasses.replace(weight, splits=splits)

    x, weight = jax.eval_shape(make, jax.random.key(0))
    if reason := gpu.obstacle(x, rotation, weight, gated=gated):
        raise ValueError(reason)
    _, rule = gpu._plan(x, rotation, weight, gated)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
    found = []
    for tiles in {rule, *around(rule, weight.tiles)}:

        def linear(x, weight, tiles=tiles):
            op = functools.partial(gpu.quantized_linear, epsilon=1e-5, out_dtype=jnp.bfloat16, gated=gated)
            return op(x, rotation, settings, weight, None, None, tiles=tiles)

        try:
            found.append((timing.seconds_each(linear, make, size), tiles))
        except Exception as error:  # whatever the compiler says of tiles that do not fit
            print(f"  {tiles}: {str(error).splitlines()[0][:100]}", flush=True)
    return rule, sorted(found, key=lambda pair: pair[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=shapes.SHAPES, action="append", required=True)
    for shape in parser.parse_args().shape:
        for name, (n, m) in shapes.matrices(shapes.SHAPES[shape]).items():
            try:
                rule, found = timed(n, m, gated=name == "gate,up")
            except ValueError as error:
                print(f"{shape}, {name} {n}x{m}: {error}")
                continue
            now = next(seconds for seconds, tiles in found if tiles == rule)
            print(f"{shape}, {name} {n}x{m}: {now * 1e6:.2f} us by {rule}", flush=True)
            for seconds, tiles in found[:4]:
                print(f"  {seconds * 1e6:.2f} us, {now / seconds:.3f} x: {tiles}", flush=True)
