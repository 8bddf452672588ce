"""Where XLA takes a GPU's matrix products from."""

import logging
import os

import jax
import pytest

from twla_jax import devices, xla_flags

LIBRARIES = "--xla_gpu_enable_triton_gemm=false"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", LIBRARIES),
        ("--xla_cpu_enable_fast_math=true", f"--xla_cpu_enable_fast_math=true {LIBRARIES}"),
        ("--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
    ],
)
def test_flags_that_are_set_stay(before, after, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    assert xla_flags.triton_gemm_is_set() == (before == after)
    xla_flags.disable_triton_gemm()
    assert os.environ["XLA_FLAGS"] == after


@pytest.mark.parametrize(
    ("backend", "flags", "warns"), [("gpu", "", True), ("gpu", LIBRARIES, False), ("tpu", "", False)]
)
def test_a_gpu_without_the_flag_is_warned_of(backend, flags, warns, monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("XLA_FLAGS", flags)
    devices.warn_if_triton_gemm.cache_clear()
    with caplog.at_level(logging.WARNING):
        devices.warn_if_triton_gemm()
    devices.warn_if_triton_gemm.cache_clear()
    assert ("set XLA_FLAGS=--xla_gpu_enable_triton_gemm=false" in caplog.text) == warns
