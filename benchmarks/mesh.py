"""Compares several devices with one, and a killed run with a whole one: `python benchmarks/mesh.py --devices 2,4`.

Random weights of published shapes. Quantising (the second block), a step of refinement and decode steps of a packed
model run on one device and on meshes, are compared, and timed once they are compiled; their rows are printed as they
come. First of all a quantisation on a mesh is killed in its third block and run again: its bytes must be those of one
that nothing disturbed. `--simulate --shape tiny --decode-shape tiny --windows 4 --seq-len 64 --batch 4` tries all of it
on a CPU.
"""

import argparse
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
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

PARTS = ("resume", "quantise", "refine", "decode")
Found = tuple[float, np.ndarray]  # seconds, and what must agree


def host_model(config: DecoderConfig) -> Any:
    """Return a random model in full precision, held by the host."""
    return jax.tree.map(np.asarray, random_model(config, activation_bits=None))


def watched(begins: Callable[[int], None], ends: Callable[[float], None]) -> Callable[..., Any]:
    """Return `quantize_block` that says when a block begins, and how many seconds it took."""
    quantize_block, blocks = pipeline.quantize_block, iter(range(1000))

    def run(*args: Any) -> Any:
        begins(next(blocks))
        begin = time.perf_counter()
        result = jax.block_until_ready(quantize_block(*args))
        ends(time.perf_counter() - begin)
        return result

    return run


def quantise(config: DecoderConfig, windows: np.ndarray, mesh: Any) -> Found:
    """Return the seconds of the last block, the first of which compiles, and the output errors of all sites."""
    settings = dataclasses.replace(load_recipe("w1.58-g128").quantization, rotation=None)
    quantize_block, seconds = pipeline.quantize_block, []
    pipeline.quantize_block = watched(lambda index: None, seconds.append)
    try:
        model = host_model(config)
        _, figures = pipeline.quantize_blocks(model, windows, settings, mesh=mesh, progress=False)
    finally:
        pipeline.quantize_block = quantize_block
    return seconds[-1], np.asarray([site["output_error"] for site in figures["sites"]])


def refine(config: DecoderConfig, windows: np.ndarray, mesh: Any) -> Found:
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


def decoding(config: DecoderConfig, mesh: Any) -> Found:
    """Return the seconds of a decode step of the packed model at batch 1, and sixteen greedy tokens."""
    model = random_decoder(config, activation_bits=4, embedding_bits=4, mesh=mesh)
    settings = decode.DecodeSettings(activation_bits=(4,), mesh=mesh)
    tokens = generate(model, np.ones((1, 8), np.int32), max_new_tokens=16, eos_token_ids=())
    return decode.step_seconds(model, 1, settings), tokens


def quantise_for_parent(config: DecoderConfig, mesh: Any, work: str) -> None:
    """Quantise four blocks, on from what is in the folder `work`; print a line a block, and a digest of the result."""
    windows = np.random.default_rng(0).integers(0, config.vocab_size, (16, 256)).astype(np.int32)
    settings = dataclasses.replace(load_recipe("w1.58-g128").quantization, rotation=None)
    pipeline.quantize_block = watched(lambda index: print("begins", flush=True), lambda seconds: None)
    model = host_model(dataclasses.replace(config, num_layers=4))
    found, _ = pipeline.quantize_blocks(model, windows, settings, mesh=mesh, work_dir=work, progress=False)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(found):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    print(digest.hexdigest(), flush=True)


def child(arguments: list[str], work: str, programs: str, kill_at: int) -> tuple[int, str]:
    """Return how many blocks a process began, and its digest; it is killed as soon as it has begun `kill_at`."""
    command = [sys.executable, __file__, *arguments, "--work", work]
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        begun, last = 0, ""
        for line in process.stdout:
            last, begun = line.strip(), begun + (line == "begins\n")
            if begun == kill_at:
                process.send_signal(signal.SIGKILL)
    if process.returncode not in ((-signal.SIGKILL,) if kill_at else (0,)):
        sys.exit(f"the quantisation in another process ended with {process.returncode}")
    return begun, last


def resume(arguments: list[str], devices: int) -> bool:
    """Print the row of a killed and resumed quantisation; return whether its bytes are those of a whole one."""
    arguments = [*arguments, "--devices", str(devices)]
    with tempfile.TemporaryDirectory() as folder:
        programs = f"{folder}/programs"
        begin = time.perf_counter()
        _, whole = child(arguments, f"{folder}/whole", programs, 0)
        took = time.perf_counter() - begin
        child(arguments, f"{folder}/killed", programs, 3)
        again, resumed = child(arguments, f"{folder}/killed", programs, 0)
    same = "the same bytes" if whole == resumed else "OTHER BYTES"
    print(
        f"{'resume':9} data={devices:<5} four blocks in {took:.0f} s; killed in the third, then {again} more: {same}",
        flush=True,
    )
    return whole == resumed


def compare(part: str, run: Callable[[Any], Found], axis: str, devices: list[int]) -> None:
    """Print a row for each mesh: the seconds of one device, of the mesh, their ratio, and whether both agree."""
    alone, expected = run(None)
    for count in devices:
        together, found = run(sharding.make_mesh(f"{axis}={count}"))
        if part == "decode":
            speed = f"{1 / alone:.0f} and {1 / together:.0f} tokens/s"
            agree = f"{speed}, {(found == expected).mean():.0%} of the tokens are the same"
        else:
            agree = f"differs by {np.abs(found / expected - 1).max():.2e} at most"
        name = f"{axis}={count}"
        print(
            f"{part:9} {name:10}{alone:10.4f} s{together:10.4f} s{alone / together:8.2f} ×   {agree}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--devices", default="2", help="numbers of devices, with commas")
    parser.add_argument(
        "--shape", default="qwen3-8b", choices=SHAPES, help="of what is quantised and refined"
    )
    parser.add_argument("--layers", type=int, default=2, help="blocks of it")
    parser.add_argument("--decode-shape", default="llama-2-70b", choices=SHAPES)
    parser.add_argument("--decode-layers", type=int, help="blocks of it; all by default")
    parser.add_argument("--resume-shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8, help="windows of a refinement step")
    parser.add_argument("--simulate", action="store_true", help="devices that a CPU stands for")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # of the process that is killed
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    devices = [int(count) for count in options.devices.split(",")]
    xla_flags.disable_triton_gemm()
    if options.simulate:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(devices))
    resumed = SHAPES[options.resume_shape]
    if options.work:
        quantise_for_parent(resumed, sharding.make_mesh(f"data={devices[0]}"), options.work)
        return
    same = True
    if "resume" in options.parts:  # before this process takes the devices' memory
        given = ["--resume-shape", options.resume_shape, *(["--simulate"] if options.simulate else [])]
        for count in devices:
            same &= resume(given, count)
    config = dataclasses.replace(SHAPES[options.shape], num_layers=options.layers)
    packed = SHAPES[options.decode_shape]
    packed = dataclasses.replace(packed, num_layers=options.decode_layers or packed.num_layers)
    rng = np.random.default_rng(0)
    windows = rng.integers(0, config.vocab_size, (options.windows, options.seq_len)).astype(np.int32)
    runs: dict[str, tuple[str, Callable[[Any], Found]]] = {
        "quantise": ("data", lambda mesh: quantise(config, windows, mesh)),
        "refine": ("data", lambda mesh: refine(config, windows[: options.batch], mesh)),
        "decode": ("model", lambda mesh: decoding(packed, mesh)),
    }
    asked = [part for part in PARTS if part in options.parts and part in runs]
    if asked:
        print(
            f"{options.shape}, {config.num_layers} blocks; decoding {options.decode_shape}, {packed.num_layers}"
        )
        print(
            f"{jax.devices()[0].device_kind}\n{'':20}{'1 device':>12}{'mesh':>12}{'speedup':>10}", flush=True
        )
    for part in asked:
        axis, run = runs[part]
        compare(part, run, axis, devices)
    if not same:
        sys.exit("a resumed quantisation came to other bytes than a whole one")


if __name__ == "__main__":
    main()
