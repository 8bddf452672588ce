"""The residual stream begins as the first block reads it, and lies where there is room."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from twla_jax.models.decoder import Decoder
from twla_jax.quantization import memory, stream

from helpers import tiny

RECIPE, WINDOWS = tiny.RECIPE, tiny.WINDOWS


def test_streams_beside_one_another_share_the_device(model, monkeypatch):
    held = []
    put = stream.ResidualStream._keep
    monkeypatch.setattr(stream.ResidualStream, "_keep", lambda self, x: held.append(put(self, x)) or held[-1])
    needed = memory.stream_bytes(model, WINDOWS.size, RECIPE.quantization)  # of both
    for room, kind in ((0.9 * needed, np.ndarray), (1.1 * needed, jax.Array)):
        monkeypatch.setattr(stream, "_device_bytes", lambda room=room: room / stream.DEVICE_SHARE)
        stream.ResidualStream(model, WINDOWS, None, streams=2).start()
        assert isinstance(held[-1], kind)


def test_the_stream_begins_with_what_the_first_block_reads(tiny_config):
    """Gemma and Granite multiply their embeddings by a scale."""
    config = dataclasses.replace(tiny_config, embed_scale=7.0)
    model = jax.tree.map(np.asarray, Decoder(config, rngs=nnx.Rngs(0)))
    residual = stream.ResidualStream(model, WINDOWS, None)
    residual.start()
    expected = 7.0 * model.embed.get_value()[WINDOWS]
    np.testing.assert_allclose(np.concatenate(residual.saved()), expected, rtol=1e-6)
