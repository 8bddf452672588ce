"""Cycles of a decode step on a TPU by the compiler's own schedule: `python benchmarks/tpu_step.py`, on any CPU.

Needs `pip install '.[aot]'`. Of a packed model of a published shape, a step with one block is compiled, and the
block alone: the difference is embedding, head and the choice of a token. Beside the cycles of kernels and of XLA's own
ops are those in which the bytes that a step reads come from memory, packed and in bf16. Nothing is run: this is a
schedule, not a measurement; see `tpu_schedule.py`, which has single kernels.
"""

import argparse
import dataclasses
import functools
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from tpu_schedule import CHIPS, Compiler

from twla_jax.bench import shapes
from twla_jax.inference import generation
from twla_jax.inference.sampling import Sampling
from twla_jax.models.blocks import ChainBlock
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention.kv_cache import KVCache, LayerKV
from twla_jax.ops.decode_attention import tpu as attention_tpu

HEADER = (
    "| chip | sequences | part | kernels | XLA's ops | bytes from memory | in bf16 | all | × bytes | in bf16 ÷ all |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def read_bytes(model: Decoder, cache: KVCache, *, blocks: bool = True) -> tuple[int, int]:
    """Return the bytes that a step reads, packed and in bf16: blocks and cache, if asked for, and the head."""
    head = model.embed if model.head is None else model.head
    packed, entries = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in ((model.blocks if blocks else (), model.norm, head), cache.layers if blocks else ())
    )
    weights = model.config.vocab_size * model.config.hidden_size
    weights += shapes.quantized_weights(model.config) if blocks else 0
    return packed + entries, 2 * weights + entries


def block_step(
    model: Decoder, block: ChainBlock, x: jax.Array, cache: LayerKV, length: jax.Array
) -> tuple[jax.Array, LayerKV]:
    """Return what `Decoder.decode` has of one token after a block."""
    context = model.context(1, start=length, keys=cache.entries.shape[-2])
    return block.decode(x, cache, context.layer(0))


def attention(
    compiler: Compiler, chip: str, model: Decoder, layer: LayerKV, batch: int
) -> tuple[float, float]:
    """Return the cycles of one token's attention, and those in which a layer's cache comes from memory."""
    q = jnp.zeros((batch, model.config.num_heads, model.config.head_dim), jnp.bfloat16)
    at = jnp.zeros(1, jnp.int32)
    if attention_tpu.obstacle(q, layer):
        return 0, 0
    kernel, _ = compiler.cycles(chip, attention_tpu.attend, q, layer.stores, at, at)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer.stores))
    return kernel, size / CHIPS[chip].bandwidth


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
    config = dataclasses.replace(shapes.SHAPES[options.shape], num_layers=1)
    model = shapes.random_decoder(config, activation_bits=8, embedding_bits=8)
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(Path(folder))
        print(HEADER)
        for chip in options.chips.split(","):
            for batch in map(int, options.batch.split(",")):
                cache = model.init_cache(batch, options.context, jnp.int8)
                token, key = jnp.zeros(batch, jnp.int32), jax.random.key(0)
                operands = model, token, cache, Sampling().sampler(), key
                step = compiler.cycles(chip, generation.step.__wrapped__, *operands, donated=(2,))
                x = jnp.zeros((batch, 1, config.hidden_size), jnp.bfloat16)
                of_block = model.layers[0], x, cache.layer(0), cache.length
                alone = compiler.cycles(chip, functools.partial(block_step, model), *of_block, donated=(2,))
                if options.names:
                    print(Counter(compiler.by_name).most_common(25))
                both = read_bytes(model, cache)
                head = read_bytes(model, cache, blocks=False)
                bandwidth = CHIPS[chip].bandwidth
                attends = attention(compiler, chip, model, cache.layer(0), batch)
                block = _parts(alone, [(a - b) / bandwidth for a, b in zip(both, head, strict=True)], attends)
                rest = _parts(
                    [a - b for a, b in zip(step, alone, strict=True)], [size / bandwidth for size in head]
                )
                whole = [r + layers * b for r, b in zip(rest, block, strict=True)]
                _print(chip, batch, "a block", *block)
                _print(chip, batch, "head and rest", *rest)
                _print(chip, batch, f"step, {layers} blocks", *whole)


def _parts(
    cycles: Sequence[float], memory: Sequence[float], attends: tuple[float, float] = (0, 0)
) -> list[float]:
    """Return the cycles of kernels, XLA's ops, both memories, and all; `attends` is what `attention` returns."""
    others = max(cycles[0] - attends[0], memory[0] - attends[1])
    return [*cycles, *memory, others + max(attends) + cycles[1]]


def _print(chip: str, batch: int, part: str, *numbers: float) -> None:
    _, _, memory, floats, everything = numbers
    ratios = [f"{everything / memory:.2f}", f"{floats / everything:.2f}"]
    print(f"| {' | '.join([chip, str(batch), part, *(f'{n:,.0f}' for n in numbers), *ratios])} |", flush=True)


if __name__ == "__main__":
    main()
