"""Scores models whose layers are in files: all windows go through one block before the next block is read."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from twla_jax import hosts
from twla_jax.evaluation.divergence import hidden_divergence
from twla_jax.evaluation.nll import hidden_nll
from twla_jax.models import sharding
from twla_jax.models.decoder import Decoder
from twla_jax.models.stored_layers import in_turn, without_blocks
from twla_jax.progress import Bar
from twla_jax.quantization.advance import finish_block
from twla_jax.quantization.stream import ResidualStream


def window_figures(
    model: Decoder,
    original: Decoder | None,
    windows: Int32[np.ndarray, "w t"],
    *,
    chunk: int,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool,
) -> dict[str, Float[np.ndarray, " w"]]:
    """Return what `window_nll`, or with an original `window_divergence`, says of every window.

    Args:
      model: quantised or not; its layers may be in files.
      original: another, or None.
      windows: tokens.
      chunk: positions whose logits exist at the same time, per batch.
      mesh: as `evaluate` takes it.
      progress: a bar on stderr, a step a block.
    """
    models = [each for each in (model, original) if each is not None]
    total = sum(each.config.num_layers for each in models)
    with Bar(total=total, desc="evaluate", unit="block", disable=not progress) as bar:
        streams = [_past_all_blocks(each, windows, mesh, len(models), bar) for each in models]
    heads = [sharding.place(without_blocks(each), mesh) for each in models]
    found: dict[str, list[np.ndarray]] = {}
    for tokens, *batches in zip(streams[0].windows, *(stream.batches() for stream in streams), strict=True):
        hidden = tuple(batch.state.x for batch in batches)
        figures = _figures(tuple(heads), hidden, sharding.place_batch(tokens, mesh), chunk=chunk)
        for name, values in figures.items():
            found.setdefault(name, []).append(hosts.fetch(values))
    return {name: np.concatenate(values)[: len(windows)] for name, values in found.items()}


def _past_all_blocks(
    model: Decoder, windows: np.ndarray, mesh: jax.sharding.Mesh | None, streams: int, bar: Bar
) -> ResidualStream:
    stream = ResidualStream(model, windows, mesh, streams=streams)
    stream.start()
    for index, block in enumerate(in_turn(model.blocks, 0, model.config.num_layers)):
        finish_block(sharding.place(block, mesh), stream, stream.context.layer(index), first=0)
        bar.update()
    return stream


@functools.partial(jax.jit, static_argnames="chunk")
def _figures(
    heads: tuple[Decoder, ...],
    outputs: tuple[Float[Array, "b t d"], ...],
    windows: Int32[Array, "b t"],
    *,
    chunk: int,
) -> dict[str, Float[Array, " b"]]:
    """Return the figures of one batch from the outputs of each model's last block."""
    hidden = tuple(head.norm(x) for head, x in zip(heads, outputs, strict=True))
    if len(heads) == 1:
        return {"nll": hidden_nll(heads[0], hidden[0], windows, chunk=chunk)}
    return hidden_divergence(heads[0], heads[1], (hidden[0], hidden[1]), windows, chunk=chunk)
