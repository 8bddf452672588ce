"""Says what a quantisation will take, in memory, time and bytes, before anything but the configuration is read."""

import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from twla_jax.devices import host_bytes
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.quantization import memory
from twla_jax.quantization.stream import DEVICE_SHARE
from twla_jax.recipe import Recipe
from twla_jax.reports.run import peak_memory
from twla_jax.storage import prediction

_STORED = 2  # bytes of a number in a published model
_BLOCKS = 3  # on the host: in use, read ahead, and on its way to the device
_PRODUCT = 2048  # rows and columns of the matrix product that the device's speed is taken from
_EFFICIENCY = 0.5  # of that speed, that calibration reaches
_COLUMN_SECONDS = 1e-4  # of the column sweep, which goes through an input's columns one by one


def forecast(
    config: DecoderConfig, recipe: Recipe, *, dtype: str = "float32", rate: float | None = None
) -> dict[str, Any]:
    """Return the figures of quantising a model of this shape on the device at hand.

    Args:
      config: of the model.
      recipe: of the quantisation.
      dtype: what the model computes in.
      rate: floating-point operations a second of the device in that type; measured in a moment if None.

    Returns:
      A JSON-ready dict: `output` (see `prediction.predict`), `host_bytes`, `device_bytes` and `disk_bytes` at their
      peaks with their parts, `seconds` (rough: within a factor of two), and `refined`: whether the recipe also trains
      the whole model, which these figures leave out.
    """
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    settings, text = recipe.quantization, recipe.calibration
    tokens = text.windows * text.seq_len
    streams = memory.stream_bytes(model, tokens, settings)
    snapshot = memory.snapshot_bytes(model, tokens, settings)
    room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    on_host = room is not None and streams > DEVICE_SHARE * room
    block = memory.block_bytes(model, _STORED)
    table = _STORED * config.vocab_size * config.hidden_size
    device = {
        "streams": 0 if on_host else streams,
        "block": block,
        "moments": max(memory.moment_bytes(model, site, settings) for site in model.sites),
        "work": max(
            memory.batch_bytes(model, text.seq_len, text.windows),
            *(memory.site_bytes(model, site, settings) for site in model.sites),
            *(memory.rotation_bytes(model, site, settings) for site in model.sites),
        ),
    }
    host = {
        "program": peak_memory()["host_bytes"] or 0,
        "streams": streams if on_host else snapshot,
        "blocks": _BLOCKS * block,
        "embeddings": table * (1 if config.tie_word_embeddings else 2),
    }
    if room is None:  # the device is the host
        host["device"] = sum(device.values())
    output = prediction.predict(config, recipe)
    packed = output["bytes"]["total"] if output["bytes"] else config.num_layers * block // 4
    disk = {"output": packed, "partial": packed + 2 * snapshot}
    return {
        "output": output,
        "host_bytes": {**host, "total": sum(host.values())},
        "device_bytes": {**device, "total": sum(device.values())},
        "disk_bytes": {**disk, "total": sum(disk.values())},
        "seconds": _seconds(model, recipe, rate or _rate(dtype)),
        "streams_on": "host" if on_host else "device",
        "room": {"host": host_bytes(), "device": room},
        "refined": bool(recipe.refine.blocks or recipe.refine.end_to_end or recipe.refine.clips),
    }


def format_forecast(figures: dict[str, Any]) -> str:
    """Return the figures of `forecast` as lines of text."""
    lines = [prediction.format_prediction(figures["output"]), ""]
    for place in ("host", "device", "disk"):
        parts = dict(figures[f"{place}_bytes"])
        total = parts.pop("total")
        room = figures["room"].get(place)
        has = f" of {room / 1e9:.1f}" if room else ""
        each = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        lines.append(f"{place:7}{total / 1e9:9.2f} GB{has}   ({each})")
    lines.append(f"time   {figures['seconds'] / 60:9.1f} min, roughly")
    if figures["refined"]:
        lines.append("without the refinement, which holds both models and what it trains on the device")
    return "\n".join(lines)


def _seconds(model: Decoder, recipe: Recipe, rate: float) -> float:
    """Return the time of the rotations and blocks: forward passes, moments, and the columns of the sweep."""
    tokens = recipe.calibration.windows * recipe.calibration.seq_len
    settings, layers = recipe.quantization, model.config.num_layers
    passes = 2 if settings.weights.propagation else 1
    operations, columns = 0.0, 0
    for site in model.sites:
        features = [linear.features for linear in model.blocks.linears(site)]
        m, n = features[0][0], sum(outputs for _, outputs in features)
        count, taken = (model.config.num_experts, model.config.experts_per_token) if site.experts else (1, 1)
        work = m * n * (2 if site.recomputed or len(features) == 2 else 1) + m * m
        operations += 2.0 * passes * tokens * taken * work
        if settings.rotation is not None:
            operations += 6.0 * settings.rotation.steps * count * n * m * 2 * m**0.5
        columns += m
    return layers * (operations / (_EFFICIENCY * rate) + columns * _COLUMN_SECONDS)


def _rate(dtype: str) -> float:
    """Return the operations a second of a matrix product on this device, measured once."""
    x = jnp.ones((_PRODUCT, _PRODUCT), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))
    product(x).block_until_ready()
    start = time.perf_counter()
    product(x).block_until_ready()
    return 2 * _PRODUCT**3 / (time.perf_counter() - start)
