"""The sweep against plain float64 GPTQ, and the properties that make it worth its time."""

import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import e2m_atq, factors, gptq, quantizers, tensors
from twla_jax.core.settings import CompensationSettings, TernarySettings, WeightSettings

N, M, TOKENS = 24, 40, 400
RECIPE = WeightSettings(group_size=16)


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, M)) @ (np.eye(M) + 0.3 * rng.normal(size=(M, M)))
    return rng.standard_t(5, (N, M)).astype(np.float32), (x.T @ x).astype(np.float32)


def ternarize(weight, moment, *, rounds=3, damping=0.01, group_size=16):
    settings = WeightSettings(
        quantizer=TernarySettings(rounds=rounds),
        group_size=group_size,
        compensation=CompensationSettings(damping=damping),
    )
    return gptq.quantize_matrix(
        jnp.asarray(weight), jnp.asarray(moment), jnp.float32(TOKENS), settings=settings
    )


def damped(moment, damping=0.01):
    h = moment.astype(np.float64) / TOKENS
    return h + damping * np.diag(h).mean() * np.eye(len(h))


def test_factors_invert_each_other(layer):
    _, moment = layer
    root, inverse, damping = factors.factor(jnp.asarray(moment / TOKENS), jnp.ones(M, bool), 0.01)
    h = damped(moment)
    np.testing.assert_allclose(root @ root.T, h, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.asarray(inverse).T @ inverse @ h, np.eye(M), atol=1e-3)
    assert np.allclose(np.tril(root, -1), 0)
    assert damping == pytest.approx(0.01)


def test_column_sweep_is_gptq(layer):
    """Fixed (α, μ), one group: codes equal those of column-by-column GPTQ written out in float64."""
    weight, moment = layer
    h = damped(moment)
    inverse = np.linalg.cholesky(np.linalg.inv(h)).T
    alpha, mu = np.abs(weight).mean(1) * 1.3, weight.mean(1)
    w, expected = weight.astype(np.float64).copy(), np.zeros((N, M))
    for j in range(M):
        expected[:, j] = np.clip(np.round((w[:, j] - mu) / alpha), -1, 1)
        error = (w[:, j] - alpha * expected[:, j] - mu) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:]
    got = gptq.sweep_codes(
        jnp.asarray(weight),
        (jnp.asarray(alpha, jnp.float32), jnp.asarray(mu, jnp.float32)),
        jnp.asarray(inverse, jnp.float32),
        jnp.ones(M, bool),
        quantizers.quantizer(RECIPE),
    )
    assert (np.asarray(got) != expected).mean() < 0.005  # float32 against float64 at ties


def test_groupwise_sweep_is_gptq_between_groups(layer):
    """With codes left as fitted (rounds 0), groups after the first see weights compensated as GPTQ compensates them."""
    weight, moment = layer
    tensor, _ = ternarize(weight, moment, rounds=0)
    inverse = np.linalg.cholesky(np.linalg.inv(damped(moment))).T
    w, quantized = weight.astype(np.float64).copy(), np.asarray(tensors.dequantize(tensor), np.float64)
    for j in range(16):
        error = (w[:, j] - quantized[:, j]) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:]
    second = jnp.asarray(w[:, 16:32], jnp.float32)
    _, _, codes = e2m_atq.euclidean_fit(second, jnp.ones(16, bool))
    stored = np.asarray(
        jnp.round((tensors.dequantize(tensor)[:, 16:32] - tensor.mu[:, 1:2]) / tensor.alpha[:, 1:2])
    )
    assert (stored != np.asarray(codes)).mean() < 0.01


def test_compensation_and_rounds_each_lower_the_output_error(layer):
    weight, moment = layer
    no_compensation = ternarize(weight, np.diag(np.diag(moment)), rounds=0)[0]
    e = weight - np.asarray(tensors.dequantize(no_compensation))
    plain = np.einsum("ni,ij,nj->", e, moment, e) / np.einsum("ni,ij,nj->", weight, moment, weight)
    errors = [float(ternarize(weight, moment, rounds=r)[1]["output_error"]) for r in (0, 1, 3)]
    assert plain > errors[0] > errors[1] >= errors[2] * 0.99


def test_propagated_weights_minimise_the_damped_distance_to_full_precision_outputs(layer):
    """Against float64 least squares: `‖W X₀ − V X‖² / t + λ‖V − W‖²` as one stacked system."""
    weight, _ = layer
    rng = np.random.default_rng(2)
    exact = rng.normal(size=(TOKENS, M)) @ (np.eye(M) + 0.3 * rng.normal(size=(M, M)))
    x = exact + 0.4 * rng.normal(size=(TOKENS, M)) - 0.2 * exact[:, ::-1]
    moment, error_moment = x.T @ x / TOKENS, (exact - x).T @ x / TOKENS
    ridge = np.sqrt(0.01 * np.diag(moment).mean() * TOKENS)
    system, target = np.vstack([x, ridge * np.eye(M)]), np.vstack([exact @ weight.T, ridge * weight.T])
    wanted = np.linalg.lstsq(system, target, rcond=None)[0].T
    _, inverse, _ = factors.factor(jnp.asarray(moment, jnp.float32), jnp.ones(M, bool), 0.01)
    for share in (0.5, 1.0):
        got = gptq.propagated(jnp.asarray(weight), jnp.asarray(error_moment, jnp.float32), inverse, share)
        expected = weight + share * (wanted - weight)
        np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(wanted).max())


def test_weights_make_up_for_what_their_outputs_are_added_to(layer):
    """Against float64 least squares: `‖(X₀' + W X₀) − (X' + V X)‖² / t + λ‖V − W‖²` as one stacked system."""
    weight, _ = layer
    rng = np.random.default_rng(3)
    exact = rng.normal(size=(TOKENS, M))
    x = exact + 0.4 * rng.normal(size=(TOKENS, M))
    lack = 0.5 * x @ rng.normal(size=(M, N)) + rng.normal(size=(TOKENS, N))  # of the stream, X₀' − X'
    moment, error_moment, mean_lack = x.T @ x / TOKENS, (exact - x).T @ x / TOKENS, lack.T @ x / TOKENS
    ridge = np.sqrt(0.01 * np.diag(moment).mean() * TOKENS)
    system = np.vstack([x, ridge * np.eye(M)])
    target = np.vstack([lack + exact @ weight.T, ridge * weight.T])
    wanted = np.linalg.lstsq(system, target, rcond=None)[0].T
    shares = CompensationSettings(propagation=1.0, stream=1.0)
    settings = WeightSettings(group_size=M, compensation=shares)
    drift = gptq.output_drift(
        *(jnp.asarray(a, jnp.float32) for a in (weight, error_moment, mean_lack)), settings
    )
    damped = np.linalg.inv(moment + 0.01 * np.diag(moment).mean() * np.eye(M))
    np.testing.assert_allclose(weight + drift @ damped, wanted, atol=2e-3 * np.abs(wanted).max())


def test_reported_output_error_is_the_real_one(layer):
    weight, moment = layer
    tensor, stats = ternarize(weight, moment)
    e = weight - np.asarray(tensors.dequantize(tensor))
    expected = np.einsum("ni,ij,nj->", e, moment, e) / np.einsum("ni,ij,nj->", weight, moment, weight)
    assert float(stats["output_error"]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("group_size", [0, 16, 40])
def test_every_group_size_packs_the_whole_row(layer, group_size):
    weight, moment = layer
    tensor, stats = ternarize(weight, moment, group_size=group_size)
    assert tensor.shape == weight.shape
    assert tensor.alpha.shape == (N, 3 if group_size == 16 else 1)
    assert 0 < float(stats["output_error"]) < 0.5


def test_damping_is_raised_only_where_the_factorisation_fails(layer):
    weight, _ = layer
    x = np.random.default_rng(1).normal(size=(3, M)).astype(np.float32)  # rank 3 of 40
    _, stats = ternarize(weight, x.T @ x, damping=1e-9)
    assert float(stats["damping"]) > 1e-9
    assert np.isfinite(float(stats["output_error"]))


def test_inputs_that_are_always_zero_do_no_harm(layer):
    weight, moment = layer
    moment = moment.copy()
    moment[5] = moment[:, 5] = 0
    _, stats = ternarize(weight, moment)
    assert np.isfinite(float(stats["output_error"]))
    _, stats = ternarize(weight, np.zeros_like(moment))
    assert np.isfinite(float(stats["weight_error"]))
