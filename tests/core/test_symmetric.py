"""One plane with μ = 0: fits against float64 NumPy, and through the column sweep."""

import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import e2m_atq, gptq, tensors
from twla_jax.core.settings import CompensationSettings, SymmetricSettings, WeightSettings


@pytest.fixture
def group():
    rng = np.random.default_rng(0)
    w = rng.standard_t(4, (16, 24)) + 0.1
    x = rng.normal(size=(100, 24)) @ rng.normal(size=(24, 24))
    return w, x.T @ x


def test_the_fit_is_thresholding_and_the_mean_of_what_is_left(group):
    w, _ = group
    mask = np.arange(24) < 20
    alpha, codes = e2m_atq.symmetric_fit(jnp.asarray(w, jnp.float32), jnp.asarray(mask))
    for row, a, t in zip(w[:, :20], alpha, np.asarray(codes)[:, :20], strict=True):
        expected = np.where(np.abs(row) > 0.75 * np.abs(row).mean(), np.sign(row), 0)
        np.testing.assert_array_equal(t, expected)
        assert a == pytest.approx(np.abs(row[expected != 0]).mean(), rel=1e-5)
    assert not np.asarray(codes)[:, 20:].any()


def test_relocation_is_the_least_output_error_over_alpha(group):
    w, metric = group
    codes = np.sign(w) * (np.abs(w) > 0.5)
    codes[0] = 0
    start = np.full(16, 0.7)
    arrays = (jnp.asarray(a, jnp.float32) for a in (w, codes, start, metric))
    alpha = np.asarray(e2m_atq.relocate_symmetric(*arrays, jnp.ones(24, bool)), np.float64)
    assert alpha[0] == pytest.approx(0.7)

    def error(a):
        e = w - a[:, None] * codes
        return np.einsum("ni,ij,nj->n", e, metric, e)[1:]

    for other in (alpha * 1.01, alpha * 0.99):
        assert (error(alpha) <= error(other)).all()


def test_the_sweep_keeps_mu_at_zero_and_lowers_the_output_error(group):
    w, metric = group
    errors = []
    for rounds in (0, 2):
        settings = WeightSettings(
            quantizer=SymmetricSettings(rounds=rounds),
            group_size=12,
            compensation=CompensationSettings(propagation=0.0) if rounds else None,
        )
        tensor, _ = gptq.quantize_matrix(
            jnp.asarray(w, jnp.float32), jnp.asarray(metric, jnp.float32), 100.0, settings=settings
        )
        assert not np.asarray(tensor.mu).any()
        e = w - np.asarray(tensors.dequantize(tensor), np.float64)
        errors.append(np.einsum("ni,ij,nj->", e, metric, e))
    assert errors[1] < 0.7 * errors[0]
