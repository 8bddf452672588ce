"""Times decode steps of a whole model: packed against the same model in bf16, and both against the memory's limit."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from twla_jax.bench import shapes, timing
from twla_jax.core.activation import OFF
from twla_jax.inference import generation
from twla_jax.inference.sampling import Sampling
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import shallow_copy
from twla_jax.ops.attention.kv_cache import KVCache, LayerKV
from twla_jax.ops.rotate_quantize import quantizer_settings

_CALLS = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """Describes what a decode step is measured at.

    Attributes:
      batches: numbers of rows that decode together.
      context: tokens in the cache before the first step.
      steps: tokens a call generates, all in one loop on the device.
      cache_dtype: of the cache; None for bf16.
      activation_bits: of the quantised models.
      embedding_bits: of their embedding and LM head; 16 for bf16.
      mesh: with an axis `model` that every model is split over; None for one device.
    """

    batches: tuple[int, ...] = (1,)
    context: int = 512
    steps: int = 64
    cache_dtype: DTypeLike | None = None
    activation_bits: tuple[int, ...] = (16, 8, 4)
    embedding_bits: int = OFF
    mesh: jax.sharding.Mesh | None = None


def decode_rows(config: DecoderConfig, settings: DecodeSettings) -> Iterator[dict[str, Any]]:
    """Yield a row for bf16, then one for W1.58 at each of the activation bits, at each batch."""
    bf16: dict[int, float] = {}
    low = [bits for bits in settings.activation_bits if bits < OFF]
    for bits in (None, *low[:1], *([OFF] if OFF in settings.activation_bits else [])):
        if reason := _does_not_fit(config, bits, settings.mesh):
            yield {"name": "bf16", "note": reason}
            continue
        before = _bytes_in_use()
        embedding = OFF if bits is None else settings.embedding_bits
        model = shapes.random_decoder(
            config, activation_bits=bits, embedding_bits=embedding, mesh=settings.mesh
        )
        jax.block_until_ready(model)
        held = _block_bytes(model, before)
        for batch in settings.batches:
            for name, model_at in _at_bits(model, [bits] if bits in (None, OFF) else low):
                taken = step_seconds(model_at, batch, settings)
                if bits is None:
                    bf16[batch] = taken
                name += f", head of {embedding} bits" if embedding < OFF else ""
                row = _row(name, model, batch, taken, settings) | held
                yield row | ({"speedup_bf16": bf16[batch] / taken} if bits and batch in bf16 else {})
                del model_at
        del model  # before the next one is made


def _at_bits(model: Decoder, bits: Sequence[int | None]) -> Iterator[tuple[str, Decoder]]:
    """Yield the name and the model at each of the bits; all below 16 are one program, with settings as data."""
    for each in bits:
        if each is not None and each < OFF:
            model = shallow_copy(model)
            for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
                for site in block.sites:
                    block.input(site).settings = nnx.data(nnx.Param(quantizer_settings(each, 0.9)))
        yield "bf16" if each is None else f"W1.58A{each}", model


def step_seconds(model: Decoder, batch: int, settings: DecodeSettings) -> float:
    """Return the median wall-clock seconds of a step, over calls of the loop that `generate` runs."""
    room = generation.bucket(settings.steps + 1)
    cache = _random_cache(model, batch, settings)
    start = cache.length
    token, ends, count = jnp.zeros(batch, jnp.int32), np.zeros(0, np.int32), jnp.int32(settings.steps + 1)
    times = []
    for call in range(_CALLS + 1):
        cache = dataclasses.replace(cache, length=start + 0)
        jax.block_until_ready(cache)
        begin = time.perf_counter()
        tokens, _, cache = generation.steps(
            model, token, cache, count, Sampling().sampler(), jax.random.key(0), ends, room=room
        )
        jax.block_until_ready(tokens)
        if call:  # the first one compiles
            times.append(time.perf_counter() - begin)
    return statistics.median(times) / settings.steps


def _random_cache(model: Decoder, batch: int, settings: DecodeSettings) -> KVCache:
    size = generation.cache_size(settings.context + settings.steps)
    cache = model.init_cache(batch, size, settings.cache_dtype)

    @jax.jit
    def fill(layer: LayerKV, key) -> LayerKV:
        def random(leaf):
            values = jax.random.normal(key, leaf.shape)
            if leaf.ndim == layer.entries.ndim - 1:  # scales are positive
                values = jnp.abs(values) + 0.1
            return (30 * values if leaf.dtype == jnp.int8 else values).astype(leaf.dtype)

        return layer.with_stores(jax.tree.map(random, layer.stores))

    assert isinstance(cache.layers, tuple)
    layers = tuple(fill(layer, jax.random.key(i)) for i, layer in enumerate(cache.layers))
    return dataclasses.replace(cache, layers=layers, length=jnp.int32(settings.context))


def _row(name: str, model: Decoder, batch: int, taken: float, settings: DecodeSettings) -> dict[str, Any]:
    head = model.embed if model.head is None else model.head
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves((model.blocks, head)))
    entries = _cache_bytes(model, batch, settings)
    devices = settings.mesh.shape["model"] if settings.mesh else 1
    limit = (weights + entries) / devices / timing.copy_bandwidth(by_clock=True)
    return {
        "name": name,
        "batch": batch,
        "layers": model.config.num_layers,
        "context": settings.context,
        "weight_bytes": weights,
        "cache_bytes": entries,
        "microseconds": taken * 1e6,
        "tokens_per_second": batch / taken,
        "bandwidth_limit_fraction": limit / taken,
    }


def _cache_bytes(model: Decoder, batch: int, settings: DecodeSettings) -> int:
    """Return the bytes of the cache that a step in the middle of the run must read."""
    positions = settings.context + settings.steps // 2
    cache = jax.eval_shape(lambda: model.init_cache(batch, positions, settings.cache_dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))


def _block_bytes(model: Decoder, before: int | None) -> dict[str, Any]:
    """Return the bits a weight of the blocks' matrices, by what the device's allocator has in use."""
    if before is None:
        return {}
    others = sum(leaf.nbytes for leaf in jax.tree.leaves((model.embed, model.head, model.norm)))
    held = (_bytes_in_use() or 0) - before - others
    return {"device_bits_per_weight": 8 * held / shapes.quantized_weights(model.config)}


def _bytes_in_use() -> int | None:
    gc.collect()  # modules refer to each other, and keep arrays that nothing else needs
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else None


def _does_not_fit(config: DecoderConfig, bits: int | None, mesh: jax.sharding.Mesh | None) -> str | None:
    stats = jax.devices()[0].memory_stats()
    if bits is not None or not stats or "bytes_limit" not in stats:
        return None
    needed = 2 * shapes.quantized_weights(config) / (mesh.shape["model"] if mesh else 1)
    if needed < 0.9 * stats["bytes_limit"]:
        return None
    return f"{needed / 1e9:.0f} GB do not fit this device; --layers takes fewer blocks"
