"""Moving arrays to the device takes no program and no second copy."""

import logging

import jax
import numpy as np

from twla_jax.devices import on_device
from twla_jax.models.stored_layers import StoredLayers


def test_arrays_move_to_the_device_as_they_are_and_nothing_is_compiled(caplog):
    numbers = np.random.default_rng(0).normal(size=(3, 7, 11))
    tree = {
        "host": numbers.astype(np.float16),
        "files": StoredLayers(lambda index: numbers[index].astype(np.float32), (3, 7, 11), np.float32),
    }
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        placed = on_device(tree)
    assert "ompiling" not in caplog.text
    for name, dtype in (("host", np.float16), ("files", np.float32)):
        assert isinstance(placed[name], jax.Array)
        assert placed[name].dtype == dtype
        np.testing.assert_array_equal(placed[name], numbers.astype(dtype))
    assert on_device(placed)["host"] is placed["host"]
