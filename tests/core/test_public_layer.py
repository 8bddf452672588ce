"""The pure layer by its public names: every function runs under jit and agrees with float64 NumPy."""

import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax import core

N, M, TOKENS = 12, 32, 200


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, M)) @ (np.eye(M) + 0.2 * rng.normal(size=(M, M)))
    return rng.normal(size=(N, M)).astype(np.float32), x.astype(np.float32)


def dense(tensor):
    """What codes, α and μ stand for, in float64."""
    codes = np.asarray(core.unpack(tensor.codes, tensor.in_features), np.float64) - 1
    alpha, mu = (
        np.repeat(np.asarray(p, np.float64), tensor.group_size, axis=1)[:, : tensor.in_features]
        for p in (tensor.alpha, tensor.mu)
    )
    return alpha * codes + mu


def test_the_layer_needs_neither_flax_nor_models_nor_files():
    code = "import sys, twla_jax.core; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name.split(".")[0] for name in modules.split()}
    assert not loaded & {"flax", "orbax", "transformers", "safetensors", "tokenizers", "gguf"}
    assert not {name for name in modules.split() if name.startswith(("twla_jax.models", "twla_jax.recipe"))}


def test_every_public_name_says_what_it_is():
    assert set(core.__all__) <= set(dir(core))
    for name in core.__all__:
        assert (getattr(core, name).__doc__ or "").strip() or name == "BIT_CHOICES", name


def test_one_matrix_is_quantised_in_one_program(layer):
    weight, x = layer
    settings = core.WeightSettings(group_size=16, quantizer=core.TernarySettings(rounds=1))

    @jax.jit
    def program(weight, x, key):
        moment = core.accumulate_moment(jnp.zeros((M, M)), x)
        rotation, losses = core.fit_rotation(weight, key, settings=core.RotationSettings(steps=3))
        rotated = core.rotate_moment(moment, rotation)
        tensor, errors = core.quantize_matrix(rotation(weight), rotated, len(x), settings=settings)
        return moment, rotation, losses, tensor, errors, core.packed_matmul(rotation(x), tensor)

    moment, rotation, losses, tensor, errors, y = program(weight, x, jax.random.key(0))
    np.testing.assert_allclose(moment, x.astype(np.float64).T @ x, rtol=1e-4, atol=1e-2)
    left, right = (np.asarray(factor, np.float64) for factor in (rotation.left, rotation.right))
    q = np.kron(left, right.T)
    assert losses.shape == (2,)
    rotated, turned = weight @ q.T, x @ q.T
    found = dense(tensor)
    np.testing.assert_allclose(y, turned @ found.T, rtol=1e-4, atol=1e-3)
    output_error = np.square(turned @ (rotated - found).T).sum() / np.square(turned @ rotated.T).sum()
    assert float(errors["output_error"]) == pytest.approx(output_error, rel=1e-3)
    assert output_error < 0.35


def test_other_quantisers_come_nearer(layer):
    weight, x = layer
    errors = []
    for kind in (
        core.TernarySettings(rounds=1),
        core.TwoPlaneSettings(rounds=1),
        core.IntegerSettings(bits=6),
    ):
        settings = core.WeightSettings(group_size=16, quantizer=kind)
        tensor, found = core.quantize_matrix(weight, x.T @ x, TOKENS, settings=settings)
        difference = np.square(x @ (weight - np.asarray(core.dequantize(tensor), np.float64)).T).sum()
        errors.append(difference / np.square(x @ weight.T).sum())
        assert float(found["output_error"]) == pytest.approx(errors[-1], rel=1e-2)
    assert errors[0] > errors[1] > errors[2]


def test_the_sweep_pushes_every_error_to_later_columns(layer):
    weight, x = layer
    moment = x.astype(np.float64).T @ x / TOKENS
    root, inverse, damping = jax.jit(core.factor)(jnp.asarray(moment), jnp.ones(M, bool), 0.01)
    h = moment + float(damping) * np.diag(moment).mean() * np.eye(M)
    np.testing.assert_allclose(np.asarray(root, np.float64) @ np.asarray(root).T, h, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(inverse, np.float64) @ root, np.eye(M), atol=1e-4)

    levels = core.quantizer(core.WeightSettings())
    alpha, mu = np.full(N, 0.9), np.full(N, 0.1)
    sweep = jax.jit(functools.partial(core.sweep_codes, levels=levels))
    scales = (jnp.asarray(alpha, jnp.float32), jnp.asarray(mu, jnp.float32))
    codes = sweep(weight, scales, inverse, jnp.ones(M, bool))
    w, u = weight.astype(np.float64), np.asarray(inverse, np.float64)
    for column in range(M):
        code = np.clip(np.round((w[:, column] - mu) / alpha), -1, 1)
        assert (code == np.asarray(codes)[:, column]).mean() > 0.9, column
        code = np.asarray(codes, np.float64)[:, column]
        error = (w[:, column] - alpha * code - mu) / u[column, column]
        w[:, column + 1 :] -= np.outer(error, u[column, column + 1 :])


def test_clips_are_those_of_least_output_error(layer):
    weight, x = layer
    x = x * np.where(np.arange(M) == 3, 8, 1).astype(np.float32)
    candidates, metric = (1.0, 0.8, 0.6, 0.4), weight.astype(np.float64).T @ weight
    clips = jax.jit(functools.partial(core.fit_clips, candidates=candidates))(
        x, jnp.asarray(metric, jnp.float32)
    )

    def error(bits, clip):
        levels, values = 2**bits - 1, x.astype(np.float64)
        low, high = (clip * f(values, -1, keepdims=True) for f in (np.min, np.max))
        scale = (high - low) / levels
        zero = np.round(-low / scale)
        delta = scale * (np.clip(np.round(values / scale) + zero, 0, levels) - zero) - values
        return np.einsum("tm,mk,tk->", delta, metric, delta)

    for bits, clip in zip(core.BIT_CHOICES, np.asarray(clips, np.float64), strict=True):
        nearest = min(candidates, key=lambda c, clip=clip: abs(c - clip))
        assert error(bits, nearest) <= 1.001 * min(error(bits, c) for c in candidates)


def test_codes_are_packed_and_multiplied_by(layer):
    _, x = layer
    rng = np.random.default_rng(1)
    codes = rng.integers(-1, 2, (N, M)).astype(np.int8)
    unpacked = jax.jit(lambda codes: core.unpack(core.pack(codes), M))(codes)
    np.testing.assert_array_equal(unpacked, codes + 1)
    alpha, mu = jnp.asarray(rng.uniform(0.5, 1, (N, 2))), jnp.asarray(rng.normal(size=(N, 2)))
    tensor = core.from_codes(jnp.asarray(codes), alpha, mu, 16)
    np.testing.assert_allclose(
        jax.jit(core.packed_matmul)(x, tensor), x.astype(np.float64) @ dense(tensor).T, rtol=1e-4, atol=1e-3
    )


def test_bits_of_a_traced_table_are_the_best_of_all():
    rng = np.random.default_rng(2)
    costs = np.sort(rng.uniform(0, 1, (5, 3)), axis=1)[:, ::-1].copy()
    interactions = 0.2 * rng.normal(size=(4, 3, 3))
    weights, choices, budget = np.array([1, 2, 1, 3, 1]), (2, 4, 8), 4.5

    @jax.jit
    def program(costs, interactions):
        return core.allocate(costs, interactions, weights, budget, choices, beta=0.5)

    def objective(option):
        pairs = sum(interactions[i, a, b] for i, (a, b) in enumerate(itertools.pairwise(option)))
        return costs[np.arange(5), option].sum() + 0.5 * pairs

    def fits(option):
        return np.dot(np.take(choices, option), weights) <= budget * weights.sum()

    options = [np.asarray(option) for option in itertools.product(range(3), repeat=5)]
    best = min(filter(fits, options), key=objective)
    np.testing.assert_array_equal(program(costs, interactions), np.take(choices, best))
