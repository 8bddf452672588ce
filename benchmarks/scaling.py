"""Time and memory of quantising by the size of the model: `python benchmarks/scaling.py qwen3-8b --json FILE`.

Random weights of a published shape, two blocks of them, stand in for files that are read a block at a time. The second
block is timed, and each rotation once it is compiled; the whole model takes as many of both as it has blocks. Figures
of several runs add up in FILE. From these `--fit` predicts models and machines that were not run, and `--plot` draws
both, for `docs/scaling.md`:

    python benchmarks/scaling.py --json benchmarks/scaling_h200.json --recipe w1.58-g128-refined \\
        --fit --plot docs/images/scaling.png
"""

import argparse
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from twla_jax import xla_flags
from twla_jax.bench.shapes import SHAPES, quantized_weights
from twla_jax.jobs import forecast
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.stored_layers import StoredLayers
from twla_jax.quantization import block, pipeline, rotation_fitting
from twla_jax.quantization.work import BlockWork, Speed, block_work, seconds
from twla_jax.recipe import Recipe, load_recipe
from twla_jax.reports import plotting
from twla_jax.reports.run import peak_memory

BLOCKS = 2
QWEN3 = {"model_type": "qwen3", "qk_norm": True, "vocab_size": 151936, "head_dim": 128, "num_kv_heads": 8}
MORE = {
    "qwen3-0.6b": {
        **QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_layers": 28,
        "num_heads": 16,
    },
    "qwen3-1.7b": {
        **QWEN3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_layers": 28,
        "num_heads": 16,
    },
    "qwen3-4b": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_layers": 36, "num_heads": 32},
    "qwen3-235b-a22b": {
        **QWEN3,
        **{"model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 1536, "num_layers": 94},
        **{"num_heads": 64, "num_kv_heads": 4, "num_experts": 128, "experts_per_token": 8},
        "normalize_routing": True,
    },
    "llama-3.1-405b": {
        **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248},
        **{"num_layers": 126, "num_heads": 128, "num_kv_heads": 8, "head_dim": 128},
    },
}
CONFIGS = SHAPES | {
    name: DecoderConfig(max_position_embeddings=8192, **shape) for name, shape in MORE.items()
}
# Taken as usual, where it was not measured: three quarters of the data sheet's bf16 and float32. A TPU computes true
# float32 in six passes of bf16.
H200 = Speed(products=7.4e14, float32=5e13)


class Machine(NamedTuple):
    """Devices that windows and rotations are spread over, their speed, and the memory of each."""

    devices: int
    speed: Speed
    room: float


MACHINES = {
    "1 × H200": Machine(1, H200, 141e9),
    "1 × H100": Machine(1, H200, 80e9),  # whose products are an H200's
    "8 × H100": Machine(8, H200, 80e9),
    "v5e-8": Machine(8, Speed(products=1.5e14, float32=2.5e13), 16e9),
    "v5p-64": Machine(32, Speed(products=3.4e14, float32=5.7e13), 95e9),
}
PREDICTED = ("qwen3-8b", "llama-2-70b", "qwen3-235b-a22b", "llama-3.1-405b")


def stored_model(config: DecoderConfig, dtype: str) -> Decoder:
    """Return a model of this shape whose layers are all the same random block, read as from a file."""
    one = dataclasses.replace(config, num_layers=1)
    abstract = nnx.eval_shape(
        lambda: Decoder(one, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), param_dtype=jnp.bfloat16)
    )
    rng = np.random.default_rng(0)

    def array(shape: tuple[int, ...]) -> np.ndarray:
        # Large arrays repeat their first values: drawing all of them would take longer than the measurement.
        values = rng.standard_normal(min(math.prod(shape), 2**24), np.float32) * 0.02
        return np.resize(values.astype(ml_dtypes.bfloat16), shape)

    def fill(path: tuple, leaf: Any) -> Any:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        if "blocks" not in names:
            return array(leaf.shape) if leaf.ndim > 1 else np.ones(leaf.shape, ml_dtypes.bfloat16)
        shape = (config.num_layers, *leaf.shape[1:])
        if leaf.ndim < 3:
            return np.broadcast_to(np.ones(1, ml_dtypes.bfloat16), shape)
        matrix = np.broadcast_to(array(leaf.shape[-2:]), leaf.shape[1:])
        return StoredLayers(lambda index: matrix, shape, matrix.dtype)

    model = jax.tree_util.tree_map_with_path(fill, abstract)
    model.config = config
    return model


def measure(name: str, recipe: Recipe, dtype: str) -> dict[str, Any]:
    """Return the seconds of a rotation and of a block, and the peaks of memory, beside what was forecast."""
    config = CONFIGS[name]
    model = stored_model(dataclasses.replace(config, num_layers=BLOCKS), dtype)
    text = recipe.calibration
    windows = np.random.default_rng(0).integers(0, config.vocab_size, (text.windows, text.seq_len))
    blocks: list[float] = []
    rotations: dict[tuple, float] = {}
    quantize_block, fit_chunk = block.quantize_block, rotation_fitting._fit_chunk

    def timed_block(*args: Any) -> Any:
        begin = time.perf_counter()
        result = jax.block_until_ready(quantize_block(*args))
        blocks.append(time.perf_counter() - begin)
        print(f"block {len(blocks) - 1}: {blocks[-1]:.1f} s", flush=True)
        return result

    def timed_rotation(kernels: Any, *args: Any, **static: Any) -> Any:
        result = jax.block_until_ready(fit_chunk(kernels, *args, **static))
        key = tuple(kernel.shape for kernel in kernels)
        if key not in rotations:
            begin = time.perf_counter()
            jax.block_until_ready(fit_chunk(kernels, *args, **static))
            rotations[key] = (time.perf_counter() - begin) / len(kernels[0])
        return result

    speed = forecast.measured_speed(dtype)
    predicted = forecast.forecast(config, recipe, dtype=dtype, speed=speed)
    pipeline.quantize_block, rotation_fitting._fit_chunk = timed_block, timed_rotation
    try:
        with tempfile.TemporaryDirectory() as work:
            pipeline.quantize_blocks(
                model, windows.astype(np.int32), recipe.quantization, work_dir=work, progress=False
            )
    finally:
        pipeline.quantize_block, rotation_fitting._fit_chunk = quantize_block, fit_chunk
    a_rotation, a_block = sum(rotations.values()), blocks[-1]
    peak = peak_memory()
    return {
        "shape": name,
        "device": jax.devices()[0].device_kind,
        "speed": dataclasses.asdict(speed),
        "weights": quantized_weights(config),
        "layers": config.num_layers,
        "tokens": int(windows.size),
        "dtype": dtype,
        "rotation_seconds": a_rotation,
        "block_seconds": a_block,
        "model_seconds": config.num_layers * (a_rotation + a_block),
        "forecast_seconds": predicted["seconds"],
        "device_bytes": peak["device_bytes"],
        "forecast_device_bytes": predicted["device_bytes"]["total"],
        "host_bytes": peak["host_bytes"],
        "forecast_host_bytes": predicted["host_bytes"]["total"],
    }


def shapes_of(name: str, dtype: str) -> Decoder:
    """Return a model of a published shape without its arrays."""
    return nnx.eval_shape(lambda: Decoder(CONFIGS[name], rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))


def counted(name: str, recipe: Recipe, dtype: str) -> BlockWork:
    """Return the work of a block of a published shape."""
    text = recipe.calibration
    return block_work(shapes_of(name, dtype), text.windows, text.seq_len, recipe.quantization)


def fitted(rows: list[dict[str, Any]], recipe: Recipe) -> np.ndarray:
    """Return by what the seconds of a rotation and of a block are to be multiplied: measured by counted, on average."""
    ratios = []
    for row in rows:
        speed = Speed(**row["speed"]) if row.get("speed") else H200
        measured = np.asarray([row["rotation_seconds"], row["block_seconds"]])
        ratios.append(measured / np.asarray(seconds(counted(row["shape"], recipe, row["dtype"]), speed)))
    return np.exp(np.log(ratios).mean(0))


def predict(
    name: str, recipe: Recipe, dtype: str, machine: Machine, factors: np.ndarray
) -> tuple[float, float]:
    """Return minutes, and the bytes of a device; windows are spread over a machine's devices, moments are not."""
    layers = CONFIGS[name].num_layers
    times = np.asarray(seconds(counted(name, recipe, dtype), machine.speed, machine.devices))
    parts = forecast.device_bytes(shapes_of(name, dtype), recipe, int(machine.room), machine.devices)
    return layers * float(factors @ times) / 60, float(sum(parts.values()))


def print_fit(rows: list[dict[str, Any]], recipe: Recipe, dtype: str) -> dict[str, dict[str, float]]:
    """Print measured beside fitted times, then predictions by machine; return the predicted minutes that fit."""
    factors = fitted(rows, recipe)
    print(f"\ncounted seconds × {factors[0]:.2f} for rotations, × {factors[1]:.2f} for blocks\n\nmeasured:")
    for row in rows:
        speed = Speed(**row["speed"]) if row.get("speed") else H200
        times = np.asarray(seconds(counted(row["shape"], recipe, row["dtype"]), speed))
        print(
            f"{row['shape']:16}{row['weights'] / 1e9:8.2f} B   measured {row['model_seconds'] / 60:8.1f} min"
            f"   fitted {row['layers'] * float(factors @ times) / 60:8.1f} min"
        )
    found: dict[str, dict[str, float]] = {machine: {} for machine in MACHINES}
    print(f"\n{'predicted, minutes':20}" + "".join(f"{machine:>20}" for machine in MACHINES))
    for name in PREDICTED:
        cells = []
        for called, machine in MACHINES.items():
            minutes, held = predict(name, recipe, dtype, machine, factors)
            if held <= machine.room:
                found[called][name] = minutes
            says = f"{minutes:.0f}" if held <= machine.room else "no room"
            cells.append(f"{says} ({held / 1e9:.0f} GB)")
        print(f"{name:20}" + "".join(f"{cell:>20}" for cell in cells))
    return found


def plot(path: Path, rows: list[dict[str, Any]], found: dict[str, dict[str, float]]) -> None:
    """Draw minutes by the weights of a model: what was measured, and what is predicted for each machine."""
    figure = plotting.new_figure(9, 5.5)
    axes = figure.subplots()
    for (machine, minutes), marker in zip(found.items(), "os^vD", strict=True):
        weights = [quantized_weights(CONFIGS[name]) / 1e9 for name in minutes]
        style = {"fillstyle": "none", "markersize": 9, "label": f"predicted, {machine}"}
        axes.plot(weights, list(minutes.values()), marker, **style)
    for row in rows:
        label = f"measured, {row['device']}: {row['shape']}"
        axes.plot(row["weights"] / 1e9, row["model_seconds"] / 60, "k*", markersize=9, label=label)
    for name in PREDICTED:
        weights = quantized_weights(CONFIGS[name]) / 1e9
        axes.axvline(weights, color="0.85", zorder=0)
        place = {"transform": axes.get_xaxis_transform(), "rotation": 90, "ha": "right", "va": "top"}
        axes.text(weights * 0.98, 0.98, name, color="0.4", **place)
    axes.set(xscale="log", yscale="log", xlabel="weights of the blocks, billions", ylabel="minutes")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, dpi=110)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print what was measured beside what was forecast."""
    print(f"\n{'shape':16}{'B':>8}{'rotations':>11}{'block':>8}{'model':>10}{'device GB':>20}{'host GB':>18}")
    for row in rows:
        device = (row["device_bytes"] or 0) / 1e9, row["forecast_device_bytes"] / 1e9
        host = row["host_bytes"] / 1e9, row["forecast_host_bytes"] / 1e9
        print(
            f"{row['shape']:16}{row['weights'] / 1e9:8.2f}{row['rotation_seconds']:9.2f} s{row['block_seconds']:6.1f} s"
            f"{row['model_seconds'] / 60:6.1f} min{device[0]:9.1f} of {device[1]:.1f}{host[0]:9.1f} of {host[1]:.1f}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "shapes", nargs="*", choices=[*CONFIGS, []], help="one a process keeps the peaks apart"
    )
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--recipe", default="w1.58-g128")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="file that figures are added to")
    parser.add_argument("--fit", action="store_true", help="predict from the figures in --json")
    parser.add_argument("--plot", type=Path, help="with --fit, image of both")
    options = parser.parse_args(arguments)
    xla_flags.disable_triton_gemm()
    recipe = load_recipe(options.recipe).updated(
        {"calibration": {"windows": options.windows, "seq_len": options.seq_len}}
    )
    rows = [measure(name, recipe, options.dtype) for name in options.shapes]
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    new = {row["shape"] for row in rows}
    rows = [row for row in known if row["shape"] not in new] + rows
    if options.json and options.shapes:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.fit:
        if not rows:
            parser.error(
                "--fit: there are no figures; name shapes to measure, or a file of figures by --json"
            )
        found = print_fit(rows, recipe, options.dtype)
        if options.plot:
            plot(options.plot, rows, found)
    print_rows(rows)


if __name__ == "__main__":
    main()
