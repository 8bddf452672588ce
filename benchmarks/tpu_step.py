"""Cycles of a decode step on a TPU by the compiler's own schedule: `python benchmarks/tpu_step.py`, on any CPU.

Needs `pip install '.[aot]'`. A packed model of a published shape is compiled with one block and with two: the
difference is a block, the rest embedding, head and the choice of a token. Beside the cycles of kernels and of XLA's own
ops are those in which the bytes that a step reads come from memory, packed and in bf16. Nothing is run: this is a
schedule, not a measurement; see `tpu_schedule.py`, which has single kernels.
"""

import argparse
import dataclasses
import tempfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
from tpu_schedule import CHIPS, Compiler

from twla_jax.bench import shapes
from twla_jax.inference import generation
from twla_jax.inference.sampling import Sampling
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention.kv_cache import KVCache

HEADER = (
    "| chip | sequences | part | kernels | XLA's ops | bytes from memory | in bf16 | × bytes | bf16's bytes ÷ all |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def read_bytes(model: Decoder, cache: KVCache) -> tuple[int, int]:
    """Return the bytes that a step reads, packed and in bf16: blocks, head and cache, of the embedding hardly any."""
    head = model.embed if model.head is None else model.head
    packed, entries = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in ((model.blocks, model.norm, head), cache.layers)
    )
    weights = shapes.quantized_weights(model.config) + model.config.vocab_size * model.config.hidden_size
    return packed + entries, 2 * weights + entries


def main() -> None:
    """Print a row for a block, for the rest, and for a whole step of the shape's layers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="llama-2-7b", choices=shapes.SHAPES)
    parser.add_argument("--chips", default="v5e,v6e", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--context", type=int, default=640, help="positions of the cache")
    parser.add_argument("--names", action="store_true", help="print the cycles of XLA's ops by name, too")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.default_backend = lambda: "tpu"  # the device that models are prepared for
    layers = shapes.SHAPES[options.shape].num_layers
    models = {
        count: shapes.random_decoder(
            dataclasses.replace(shapes.SHAPES[options.shape], num_layers=count),
            activation_bits=8,
            embedding_bits=8,
        )
        for count in (1, 2)
    }
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(Path(folder))
        print(HEADER)
        for chip in options.chips.split(","):
            for batch in map(int, options.batch.split(",")):
                found = []
                for count, model in models.items():
                    cache = model.init_cache(batch, options.context, jnp.int8)
                    token, key = jnp.zeros(batch, jnp.int32), jax.random.key(0)
                    operands = model, token, cache, Sampling().sampler(), key
                    cycles = compiler.cycles(chip, generation.step.__wrapped__, *operands, donated=(2,))
                    found.append((*cycles, *read_bytes(model, cache)))
                    if options.names:
                        print(count, Counter(compiler.by_name).most_common(25))
                one, two = found
                block = [b - a for a, b in zip(one, two, strict=True)]
                rest = [a - b for a, b in zip(one, block, strict=True)]
                whole = [r + layers * b for r, b in zip(rest, block, strict=True)]
                _print(chip, batch, "a block", *block)
                _print(chip, batch, "head and rest", *rest)
                _print(chip, batch, f"step, {layers} blocks", *whole)


def _print(chip: str, batch: int, part: str, kernels: int, around: int, packed: int, bf16: int) -> None:
    memory, floats = (size / CHIPS[chip].bandwidth for size in (packed, bf16))
    numbers = [f"{n:,.0f}" for n in (kernels, around, memory, floats)]
    ratios = [f"{(kernels + around) / memory:.2f}", f"{floats / (kernels + around):.2f}"]
    print(f"| {' | '.join([chip, str(batch), part, *numbers, *ratios])} |", flush=True)


if __name__ == "__main__":
    main()
