"""Finished blocks and residual streams are kept while work goes on, and streams are read again in parts."""

import threading
import types

import ml_dtypes
import numpy as np
import pytest

from twla_jax.errors import TwlaError
from twla_jax.quantization.snapshots import Snapshots
from twla_jax.storage import resume


def test_a_slow_disk_is_not_waited_for_and_a_full_one_is_told_of():
    slow, saved = threading.Event(), []

    class Store:
        def save(self, name, arrays):
            slow.wait(10)
            saved.append((name, int(arrays.get("layer", -1))))
            if name == "block-2":
                raise TwlaError("disk full")

    def blocks():
        with Snapshots(Store()) as kept:
            for index in range(3):
                kept.keep_block(index, {})
                kept.keep_streams(index + 1, {})
            slow.set()

    with pytest.raises(TwlaError, match="disk full"):
        blocks()
    assert saved == [("block-0", -1), ("stream", 1), ("block-1", -1), ("block-2", -1)]


def test_streams_are_not_kept_past_a_block_that_could_not_be_written():
    """A disk may have room for the streams, in place of older ones, where it had none for the block before them."""
    saved, go_on = [], threading.Event()

    class Store:
        def save(self, name, arrays):
            go_on.wait(10)
            if name == "block-0":
                raise TwlaError("disk full")
            saved.append(name)

    def blocks():
        with Snapshots(Store()) as kept:
            kept.keep_block(0, {})
            kept.keep_streams(1, {})
            go_on.set()

    with pytest.raises(TwlaError, match="disk full"):
        blocks()
    assert saved == []


def test_streams_are_read_again_a_batch_at_a_time(tmp_path, monkeypatch):
    """They may be too large for the host's memory: then they lie in files, and no list of them may be made."""
    store = resume.WorkDir(tmp_path / "work", "a")
    batches = [np.full((2, 3, 4), index, ml_dtypes.bfloat16) for index in range(3)]
    held = types.SimpleNamespace(saved=lambda: batches)
    with Snapshots(store) as kept:
        assert kept.load() is None
        kept.keep_streams(5, {"x": held, "reference": None})
    read, load = [], resume.WorkDir.load
    monkeypatch.setattr(resume.WorkDir, "load", lambda *of: read.append(of[2]) or load(*of))
    first, streams = Snapshots(store).load()
    assert (first, streams.keys(), streams["x"].shape) == (5, {"x"}, (3, 2, 3, 4))
    assert len(read) == 2  # the layer, and one batch for its shape
    for expected, batch in zip(batches, streams["x"], strict=True):
        assert batch.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(batch, expected)
    assert None not in read
