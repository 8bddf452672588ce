"""Says what a quantisation will take, in memory, time and bytes, before anything but the configuration is read."""

import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from twla_jax.devices import host_bytes
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.folded_rotation import folded_config
from twla_jax.quantization import memory
from twla_jax.quantization.stream import DEVICE_SHARE
from twla_jax.quantization.work import Speed, block_work, model_seconds
from twla_jax.recipe import Recipe
from twla_jax.reports.run import peak_memory
from twla_jax.storage import prediction

_STORED = 2  # bytes of a number in a published model
_BLOCKS = 3  # on the host: in use, read ahead, and on its way to the device
_SIZE = 2048  # rows and columns of the matrix products that the device's speed is taken from
_MORE, _MOMENT = 200, 0.2  # of them in one call, at most; and the seconds that it may take


def forecast(
    config: DecoderConfig, recipe: Recipe, *, dtype: str = "float32", speed: Speed | None = None
) -> dict[str, Any]:
    """Return the figures of quantising a model of this shape on the device at hand.

    Args:
      config: of the model.
      recipe: of the quantisation.
      dtype: what the model computes in.
      speed: of the device; measured in a moment if None.

    Returns:
      A JSON-ready dict: `output` (see `prediction.predict`), `host_bytes`, `device_bytes` and `disk_bytes` at their
      peaks with their parts, `seconds` (rough; of the rotations and blocks, without reading and evaluations), and
      `refined`: whether the recipe also trains the whole model, which these figures leave out.
    """
    config = folded_config(config) if recipe.folded_rotation else config
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    settings, text = recipe.quantization, recipe.calibration
    tokens = text.windows * text.seq_len
    snapshot = memory.snapshot_bytes(model, tokens, settings)
    room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    block = memory.block_bytes(model, _STORED)
    table = _STORED * config.vocab_size * config.hidden_size
    device = device_bytes(model, recipe, room)
    on_host = _streams_on_host(model, recipe, room)
    host = {
        "program": peak_memory()["host_bytes"] or 0,
        "streams": memory.stream_bytes(model, tokens, settings) if on_host else snapshot,
        "blocks": _BLOCKS * block,
        "embeddings": table * (1 if config.tie_word_embeddings else 2),
    }
    if room is None:  # the device is the host
        host["device"] = sum(device.values())
    work = block_work(model, text.windows, text.seq_len, settings)
    output = prediction.predict(config, recipe)
    packed = output["bytes"]["total"] if output["bytes"] else config.num_layers * block // 4
    disk = {"output": packed, "partial": packed + 2 * snapshot}
    return {
        "output": output,
        "host_bytes": {**host, "total": sum(host.values())},
        "device_bytes": {**device, "total": sum(device.values())},
        "disk_bytes": {**disk, "total": sum(disk.values())},
        "seconds": model_seconds(work, config.num_layers, speed or measured_speed(dtype)),
        "streams_on": "host" if on_host else "device",
        "room": {"host": host_bytes(), "device": room},
        "refined": bool(recipe.refine.blocks or recipe.refine.end_to_end or recipe.refine.clips),
    }


def device_bytes(model: Decoder, recipe: Recipe, room: int | None, devices: int = 1) -> dict[str, int]:
    """Return a device's memory at its peak by its parts; streams that take too much of it are on the host.

    The peak is that of the fits of rotations, which come first, or of a site, while moments are gathered there or while
    its linears are quantised.

    Args:
      model: its shapes alone are read.
      recipe: of the quantisation.
      room: the device's memory; None where it is the host's own.
      devices: that the streams are split over.
    """
    settings, text = recipe.quantization, recipe.calibration
    on_host = _streams_on_host(model, recipe, None if room is None else devices * room)
    block = memory.block_bytes(model, _STORED)
    batch = memory.batch_bytes(model, text.seq_len, -(-text.windows // devices))

    def at(streams: int, moments: int, work: int) -> dict[str, int]:
        on_device = 0 if on_host else streams // devices
        return {"streams": on_device, "block": block, "moments": moments, "work": work}

    phases = [at(0, 0, memory.rotation_bytes(model, site, settings)) for site in model.sites]
    before = 0
    for index, site in enumerate(model.sites):
        streams = memory.stream_bytes(model, text.windows * text.seq_len, settings, index)
        moments = memory.moment_bytes(model, site, settings)
        product = 0 if site.experts else moments  # of a batch, before it is added
        phases.append(at(max(before, streams), moments, batch + product))
        phases.append(at(streams, moments, memory.site_bytes(model, site, settings) - moments))
        before = streams
    return max(phases, key=lambda parts: sum(parts.values()))


def _streams_on_host(model: Decoder, recipe: Recipe, room: int | None) -> bool:
    tokens = recipe.calibration.windows * recipe.calibration.seq_len
    return room is not None and memory.stream_bytes(model, tokens, recipe.quantization) > DEVICE_SHARE * room


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


def measured_speed(dtype: str) -> Speed:
    """Return what large matrix products reach on this device, measured in a moment."""
    float32 = _rate("float32")
    return Speed(products=float32 if dtype == "float32" else _rate(dtype), float32=float32)


def _rate(dtype: str) -> float:
    """Return the operations a second of matrix products in a type; of float32, true ones.

    One product on a fast device takes less time than its call. So many follow one another in one call, of which the
    time of a call with a single one is taken off.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    x = jnp.full((_SIZE, _SIZE), 1 / _SIZE, dtype)  # its own square

    @jax.jit
    def products(x, count):
        return jax.lax.fori_loop(0, count, lambda _, y: jnp.matmul(y, x, precision=precision), x)

    def taken(count: int) -> float:
        start = time.perf_counter()
        products(x, count).block_until_ready()
        return time.perf_counter() - start

    taken(1)  # which compiles
    one = taken(1)
    more = min(_MORE, int(_MOMENT / one))
    if more == 0:
        return 2 * _SIZE**3 / one
    return 2 * _SIZE**3 * more / max(taken(1 + more) - one, 1e-9)
