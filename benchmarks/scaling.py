"""Time and memory of quantising by the size of the model: `python benchmarks/scaling.py qwen3-8b --json FILE`.

Random weights of a published shape, two blocks of them, stand in for files that are read a block at a time. The second
block is timed, and each rotation once it is compiled; the whole model takes as many of both as it has blocks. Figures
of several runs add up in FILE, from which `--fit` predicts models that were not run, for `docs/scaling.md`.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from twla_jax import xla_flags
from twla_jax.bench.shapes import SHAPES
from twla_jax.jobs import forecast
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.stored_layers import StoredLayers
from twla_jax.quantization import block, pipeline, rotation_fitting
from twla_jax.recipe import Recipe, load_recipe
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
    "llama-3.1-405b": {
        **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248},
        **{"num_layers": 126, "num_heads": 128, "num_kv_heads": 8, "head_dim": 128},
    },
}
CONFIGS = SHAPES | {
    name: DecoderConfig(max_position_embeddings=8192, **shape) for name, shape in MORE.items()
}
# Devices, and their speed in products relative to that of the one that was measured: an H200's are an H100's.
MACHINES = {"1 × H100": (1, 1.0), "8 × H100": (8, 1.0), "v5e-8": (8, 0.2), "v5p-64": (32, 0.46)}
PREDICTED = ("qwen3-8b", "llama-2-70b", "llama-3.1-405b")


def stored_model(config: DecoderConfig, dtype: str) -> Decoder:
    """Return a model of this shape whose layers are all the same random block, read as from a file."""
    one = dataclasses.replace(config, num_layers=1)
    abstract = nnx.eval_shape(
        lambda: Decoder(one, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), param_dtype=jnp.bfloat16)
    )
    rng = np.random.default_rng(0)

    def array(leaf: Any) -> Any:
        values = rng.standard_normal(leaf.shape[-2:], np.float32) * 0.02
        return np.broadcast_to(values.astype(ml_dtypes.bfloat16), leaf.shape)

    def fill(path: tuple, leaf: Any) -> Any:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        if "blocks" not in names:
            return array(leaf) if leaf.ndim > 1 else np.ones(leaf.shape, ml_dtypes.bfloat16)
        shape = (config.num_layers, *leaf.shape[1:])
        if leaf.ndim < 3:
            return np.broadcast_to(np.ones(1, ml_dtypes.bfloat16), shape)
        matrix = array(leaf)[0]
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

    def timed_rotation(kernels: Any, *args: Any) -> Any:
        result = jax.block_until_ready(fit_chunk(kernels, *args))
        key = tuple(kernel.shape for kernel in kernels)
        if key not in rotations:
            begin = time.perf_counter()
            jax.block_until_ready(fit_chunk(kernels, *args))
            rotations[key] = (time.perf_counter() - begin) / len(kernels[0])
        return result

    predicted = forecast.forecast(config, recipe, dtype=dtype)
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
        "weights": predicted["output"]["weights"],
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


def work(config: DecoderConfig, recipe: Recipe, devices: int = 1) -> tuple[float, float]:
    """Return the operations of one block that devices share, and the columns of its sweeps, which they do not."""
    d, heads = config.hidden_size, config.num_heads * config.head_dim
    rows = heads + 2 * config.num_kv_heads * config.head_dim
    inputs = ((d, rows), (heads, d), (d, 2 * config.intermediate_size), (config.intermediate_size, d))
    tokens = recipe.calibration.windows * recipe.calibration.seq_len
    return sum(2.0 * tokens * (m * n + m * m) for m, n in inputs) / devices, float(sum(m for m, _ in inputs))


def fitted(rows: list[dict[str, Any]], recipe: Recipe) -> np.ndarray:
    """Return the seconds of an operation and of a column that come nearest, relatively, to the measured blocks."""
    parts = np.asarray([work(CONFIGS[row["shape"]], recipe) for row in rows])
    seconds = np.asarray([row["rotation_seconds"] + row["block_seconds"] for row in rows])
    found, *_ = np.linalg.lstsq(parts / seconds[:, None], np.ones(len(rows)), rcond=None)
    return np.maximum(found, 0)


def print_fit(rows: list[dict[str, Any]], recipe: Recipe) -> None:
    """Print measured beside fitted times, and predictions by machine."""
    cost = fitted(rows, recipe)
    print(f"\nseconds = {cost[0]:.3g} · operations + {cost[1]:.3g} · columns, a block")
    for row in rows:
        config = CONFIGS[row["shape"]]
        print(
            f"{row['shape']:16}{row['weights'] / 1e9:8.2f} B   measured {row['model_seconds'] / 60:8.1f} min"
            f"   fitted {config.num_layers * np.dot(work(config, recipe), cost) / 60:8.1f} min"
        )
    print(f"\n{'predicted, minutes':20}" + "".join(f"{machine:>12}" for machine in MACHINES))
    for name in PREDICTED:
        config = CONFIGS[name]
        cells = []
        for devices, speed in MACHINES.values():
            operations, columns = work(config, recipe, devices)
            cells.append(config.num_layers * (operations / speed * cost[0] + columns * cost[1]) / 60)
        print(f"{name:20}" + "".join(f"{cell:12.1f}" for cell in cells))


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


def main() -> None:
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
    options = parser.parse_args()
    xla_flags.disable_triton_gemm()
    recipe = load_recipe(options.recipe).updated(
        {"calibration": {"windows": options.windows, "seq_len": options.seq_len}}
    )
    rows = [measure(name, recipe, options.dtype) for name in options.shapes]
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    new = {row["shape"] for row in rows}
    rows = [row for row in known if row["shape"] not in new] + rows
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.fit:
        print_fit(rows, recipe)
    print_rows(rows)


if __name__ == "__main__":
    main()
