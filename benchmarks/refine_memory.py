"""Memory and time of the streaming refinement on random weights of a published shape.

    python benchmarks/refine_memory.py qwen3-8b --latents bfloat16
    python benchmarks/refine_memory.py qwen3-8b --latents bfloat16 --offload

Prints a row: peak device memory, bytes a weight of the blocks' linears, seconds a step, and the minutes that `--tokens`
would take. The model is made on the device, block by block, and takes its memory from the start: 2 bytes a weight for
the teacher in bfloat16, a quarter for the codes.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax import xla_flags
from twla_jax.bench import shapes
from twla_jax.models.decoder import Decoder, computing_in
from twla_jax.models.layers import replace
from twla_jax.refinement.end_to_end import WholeTraining
from twla_jax.refinement.latents import init_latents
from twla_jax.refinement.streamed import StreamedTraining
from twla_jax.refinement_settings import EndToEndSettings


def models(name: str, layers: int | None) -> tuple[Decoder, Decoder]:
    """A quantised model and a full-precision one; they share embedding and head."""
    config = shapes.SHAPES[name]
    config = dataclasses.replace(config, num_layers=layers or config.num_layers)
    teacher = _stacked(config, None)
    student = _stacked(config, 16)
    student = replace(student, embed=teacher.embed, head=teacher.head)
    return tuple(computing_in(each, jnp.bfloat16, fused=True) for each in (student, teacher))


def _stacked(config, bits: int | None) -> Decoder:
    """A random model whose blocks are made one at a time and put into stacks in place."""
    one = dataclasses.replace(config, num_layers=1)
    first = shapes.random_model(one, activation_bits=bits)
    room = jax.jit(
        lambda tree: jax.tree.map(lambda a: jnp.zeros((config.num_layers, *a.shape[1:]), a.dtype), tree)
    )
    put = jax.jit(
        lambda stack, part, i: jax.tree.map(lambda a, b: a.at[i].set(b[0]), stack, part), donate_argnums=0
    )
    blocks = room(first.blocks)
    for index in range(config.num_layers):
        # The same numbers in every layer: what they are changes neither time nor memory.
        blocks = put(blocks, first.blocks, index)
    return replace(first, blocks=blocks, config=config)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Takes the steps."""
    student, teacher = models(options.model, options.layers)
    settings = EndToEndSettings(
        batch=options.batch, streaming=True, latents=options.latents, offload=options.offload
    )
    if options.whole:
        latents = init_latents(student, teacher)
        training = WholeTraining(student, teacher, latents, settings, settings.activation_bits)
    else:
        training = StreamedTraining(student, teacher, settings)
    vocabulary = teacher.config.vocab_size
    rng = np.random.default_rng(0)
    seconds = []
    for number in range(options.steps + 1):
        tokens = rng.integers(0, vocabulary, (options.batch, options.seq_len)).astype(np.int32)
        start = time.perf_counter()
        loss = float(training.step(tokens, settings.peak_rates, number))
        jax.block_until_ready(training.values)
        seconds.append(time.perf_counter() - start)
        print(f"step {number}: {loss:.4f} nats, {seconds[-1]:.2f} s", flush=True)
    stats = jax.devices()[0].memory_stats() or {}
    step = float(np.median(seconds[1:]))
    weights = shapes.quantized_weights(teacher.config)
    return {
        "GB": stats.get("peak_bytes_in_use", 0) / 1e9,
        "bytes a weight": stats.get("peak_bytes_in_use", 0) / weights,
        "s a step": step,
        "minutes": options.tokens / (options.batch * options.seq_len) * step / 60,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = {"type": int, "metavar": "N"}
    parser.add_argument("model", nargs="?", default="qwen3-8b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--layers", default=None, help="fewer than the shape has", **number)
    parser.add_argument("--latents", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--offload", action="store_true", help="latents and moments on the host")
    parser.add_argument("--whole", action="store_true", help="the refinement that does not stream, instead")
    parser.add_argument("--batch", default=4, **number)
    parser.add_argument("--seq-len", default=2048, **number)
    parser.add_argument("--steps", default=3, help="that are timed", **number)
    parser.add_argument("--tokens", default=4_000_000, help="whose time is predicted", **number)
    options = parser.parse_args(arguments)
    xla_flags.disable_triton_gemm()
    found = measure(options)
    kind = "whole" if options.whole else f"{options.latents}{', offloaded' if options.offload else ''}"
    print(f"| {options.model} | {kind} | {options.batch} × {options.seq_len} |", end="")
    print(
        f" {found['GB']:.1f} GB | {found['bytes a weight']:.2f} bytes a weight | {found['s a step']:.2f} s a step |"
        f" {found['minutes']:.1f} min for {options.tokens / 1e6:g} M tokens |"
    )


if __name__ == "__main__":
    main()
