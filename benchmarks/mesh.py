"""Compares quantising, refining and decoding on several devices with one: `python benchmarks/mesh.py --devices 2`.

Random weights of a published shape, a few blocks. Each part is run on one device and on a mesh, compared, and timed
once it is compiled. The table comes last.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax import xla_flags
from twla_jax.bench import decode
from twla_jax.bench.shapes import SHAPES, random_decoder, random_model
from twla_jax.inference.generation import generate
from twla_jax.models import sharding
from twla_jax.models.config import DecoderConfig
from twla_jax.quantization import pipeline
from twla_jax.recipe import load_recipe
from twla_jax.refinement import descent, end_to_end
from twla_jax.refinement.latents import init_latents
from twla_jax.refinement.schedule import rates_at
from twla_jax.refinement_settings import EndToEndSettings


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the time of the second call, and what it returned."""
    jax.block_until_ready(run())
    begin = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - begin, result


def quantise(config: DecoderConfig, windows: np.ndarray, mesh: Any) -> tuple[float, Any]:
    """Return the seconds of the blocks, and their output errors by site."""
    model = jax.tree.map(np.asarray, random_model(config, activation_bits=None))
    settings = dataclasses.replace(load_recipe("w1.58-g128").quantization, rotation=None)
    for _ in range(2):  # the first compiles
        _, figures = pipeline.quantize_blocks(model, windows, settings, mesh=mesh, progress=False)
    return figures["seconds"]["blocks"], np.asarray([site["output_error"] for site in figures["sites"]])


def refine(config: DecoderConfig, windows: np.ndarray, mesh: Any) -> tuple[float, Any]:
    """Return the seconds of a step of the end-to-end refinement, and the losses of its four steps."""
    settings = EndToEndSettings(steps=4, batch=len(windows), dtype="bfloat16")
    student = descent.training_form(random_model(config, activation_bits=16), jnp.bfloat16, mesh)
    teacher = descent.training_form(random_model(config, activation_bits=None), jnp.bfloat16, mesh)
    training = end_to_end.WholeTraining(student, teacher, init_latents(student, teacher), settings, 16, mesh)
    rates, losses, begin = rates_at(settings, 1, 4), [], 0.0
    for step in range(4):
        if step == 2:
            begin = time.perf_counter()
        losses.append(float(training.step(windows, rates, step)))
    return (time.perf_counter() - begin) / 2, np.asarray(losses)


def decoding(config: DecoderConfig, mesh: Any) -> tuple[float, Any]:
    """Return the seconds of a decode step of the packed model at batch 1, and sixteen greedy tokens."""
    model = random_decoder(config, activation_bits=4, mesh=mesh)
    settings = decode.DecodeSettings(activation_bits=(4,), mesh=mesh)
    tokens = generate(model, np.ones((1, 8), np.int32), max_new_tokens=16, eos_token_ids=())
    return decode.step_seconds(model, 1, settings), tokens


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["quantise", "refine", "decode"])
    parser.add_argument("--shape", default="qwen3-8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8, help="windows of a refinement step")
    options = parser.parse_args()
    xla_flags.disable_triton_gemm()
    config = dataclasses.replace(SHAPES[options.shape], num_layers=options.layers)
    rng = np.random.default_rng(0)
    windows = rng.integers(0, config.vocab_size, (options.windows, options.seq_len)).astype(np.int32)
    makers: dict[str, tuple[str, Callable[[Any], tuple[float, Any]]]] = {
        "quantise": ("data", lambda mesh: quantise(config, windows, mesh)),
        "refine": ("data", lambda mesh: refine(config, windows[: options.batch], mesh)),
        "decode": ("model", lambda mesh: decoding(config, mesh)),
    }
    lines = []
    for part in options.parts:
        axis, run = makers[part]
        alone, expected = run(None)
        print(f"{part}, one device: {alone:.4f} s", flush=True)
        together, found = run(sharding.make_mesh(f"{axis}={options.devices}"))
        if part == "decode":
            agree = f"{(found == expected).mean():.0%} of the tokens are the same"
        else:
            agree = f"differs by {np.abs(found / expected - 1).max():.2e} at most"
        name = f"{axis}={options.devices}"
        lines.append(f"{part:10}{alone:10.4f} s{together:12.4f} s{alone / together:8.2f} ×   {name}: {agree}")
    print(f"\n{options.shape}, {options.layers} blocks, {jax.devices()[0].device_kind}")
    print(f"{'':10}{'1 device':>12}{f'{options.devices} devices':>14}{'speedup':>10}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
