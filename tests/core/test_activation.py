"""Per-token quantisation keeps its error bound, and clips are chosen by output error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import activation

from helpers.compiled import compiled_programs

CLIPS = (0.6, 0.8, 1.0)


@pytest.fixture
def tokens():
    return np.asarray(jax.random.t(jax.random.key(0), 3.0, (64, 96)) + 0.2, np.float32)


@pytest.mark.parametrize("bits", activation.BIT_CHOICES)
def test_error_is_at_most_a_step_and_codes_fit_the_bits(tokens, bits):
    quantized = np.asarray(activation.fake_quantize(jnp.asarray(tokens), bits, 1.0))
    step = (tokens.max(-1) - tokens.min(-1)) / (2**bits - 1)
    assert (np.abs(quantized - tokens) <= 1.01 * step[:, None]).all()
    assert max(len(np.unique(row)) for row in quantized) <= 2**bits


def test_the_formula_against_float64(tokens):
    bits, clip = 4, 0.8
    x = tokens.astype(np.float64)
    scale = clip * (x.max(-1, keepdims=True) - x.min(-1, keepdims=True)) / 15
    zero = np.round(-clip * x.min(-1, keepdims=True) / scale)
    expected = scale * (np.clip(np.round(x / scale) + zero, 0, 15) - zero)
    got = np.asarray(activation.fake_quantize(jnp.asarray(tokens), bits, clip))
    assert (np.abs(got - expected) > 1e-4).mean() < 1e-3  # float32 ties may round the other way


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_constant_tokens_stay_finite(value):
    assert np.isfinite(np.asarray(activation.fake_quantize(jnp.full((2, 8), value), 4, 1.0))).all()


def test_fitted_clips_are_the_best_of_the_candidates(tokens):
    weight = np.random.default_rng(0).normal(size=(20, 96)).astype(np.float32)
    chosen = activation.fit_clips(jnp.asarray(tokens), jnp.asarray(weight.T @ weight), CLIPS)
    for bits, clip in zip(activation.BIT_CHOICES, np.asarray(chosen, np.float32), strict=True):
        errors = [
            np.square(
                (np.asarray(activation.fake_quantize(jnp.asarray(tokens), bits, c)) - tokens) @ weight.T
            ).sum()
            for c in CLIPS
        ]
        assert CLIPS[int(np.argmin(errors))] == pytest.approx(clip, abs=1e-3)


def test_bits_are_data_and_16_is_off(tokens):
    quantizer = activation.ActivationQuantizer(
        bits=jnp.int32(8), clips=jnp.asarray([0.6, 0.7, 0.9, 1.0], jnp.float16), enabled=True
    )
    apply = jax.jit(lambda q, x: q(x))
    four = activation.with_bits(quantizer, 4)
    np.testing.assert_allclose(
        apply(four, tokens),
        activation.fake_quantize(jnp.asarray(tokens), 4, jnp.float16(0.7)),
        rtol=1e-5,
        atol=1e-5,
    )
    apply(activation.with_bits(quantizer, 2), tokens)
    assert compiled_programs(apply) == 1
    mixed_off = dataclasses.replace(quantizer, bits=jnp.int32(16))
    np.testing.assert_array_equal(apply(mixed_off, tokens), tokens)
    assert not activation.with_bits(quantizer, 16).enabled
