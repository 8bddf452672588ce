"""Which implementation of an op runs, and what the log says about it."""

import functools
import logging
import types

import jax
import jax.numpy as jnp
import pytest

from twla_jax.errors import TwlaError
from twla_jax.inference import execution
from twla_jax.ops import dispatch


def test_a_fallback_is_logged_and_a_forced_kernel_refused(caplog):
    arguments = ("op", lambda x: x + 1, {"gpu": lambda x: x, "tpu": lambda x: x}, {"gpu": "too odd"})
    with caplog.at_level(logging.INFO):
        assert dispatch.dispatch("op", None, *arguments[1:], jnp.int32(1)) == 2
    assert "op: the XLA reference replaces the gpu kernel: too odd" in caplog.text
    with pytest.raises(TwlaError, match="'gpu' cannot be used: too odd"):
        dispatch.dispatch("op", "gpu", *arguments[1:], jnp.int32(1))
    with pytest.raises(TwlaError, match="'triton' must be one of xla, gpu, tpu"):
        dispatch.dispatch("op", "triton", *arguments[1:], jnp.int32(1))


@pytest.mark.parametrize(
    ("capability", "fits"), [("8.0", False), ("9.0", True), ("10.0", False), (None, False)]
)
def test_gpus_that_are_no_hoppers_are_left_to_the_reference(capability, fits, monkeypatch, caplog):
    device = types.SimpleNamespace(device_kind="NVIDIA A100", compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert execution.has_kernels() == fits
    assert execution.path() == ("gpu kernels" if fits else "XLA reference: NVIDIA A100 is no Hopper GPU")
    op = functools.partial(dispatch.dispatch, f"op on {capability}")
    arguments = lambda x: x + 1, {"gpu": lambda x: x}, {}, jnp.int32(1)
    with caplog.at_level(logging.INFO):
        assert op(None, *arguments) == 2  # compiled for a CPU in any case
    assert ("NVIDIA A100 is no Hopper GPU" in caplog.text) != fits
    if not fits:
        with pytest.raises(TwlaError, match="'gpu' cannot be used: NVIDIA A100 is no Hopper GPU"):
            op("gpu", *arguments)
