"""One plane without μ: fits against float64 NumPy, through the column sweep, and in the kernels' form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import e2m_atq, gptq, tensors
from twla_jax.core.settings import CompensationSettings, SymmetricSettings, WeightSettings
from twla_jax.ops.ternary_matmul import kernel_weight


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


def test_the_sweep_holds_no_mu_and_lowers_the_output_error(group):
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
        assert tensor.mu is None
        e = w - np.asarray(tensors.dequantize(tensor), np.float64)
        errors.append(np.einsum("ni,ij,nj->", e, metric, e))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("group_size", [128, 384])
def test_without_mu_all_is_as_with_a_plane_of_zeros(group_size):
    rng = np.random.default_rng(1)
    codes = jnp.asarray(rng.integers(-1, 2, (40, 384)), jnp.int8)
    alpha = jnp.asarray(rng.uniform(0.1, 1, (40, 384 // group_size)), jnp.float32)
    zeros = jnp.zeros_like(alpha)
    (alone, none), (beside, _) = (tensors.in_whole_steps(alpha, mu, group_size) for mu in (None, zeros))
    np.testing.assert_array_equal(alone, beside)
    assert none is None
    pair = [tensors.from_codes(codes, alone, mu, group_size) for mu in (None, zeros)]
    np.testing.assert_array_equal(*map(tensors.dequantize, pair))
    jax.tree.map(np.testing.assert_array_equal, *(kernel_weight([tensor]) for tensor in pair))
    for tensor in pair:
        np.testing.assert_array_equal(tensor.offsets(), zeros)
