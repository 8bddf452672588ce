"""The integer baselines: round-to-nearest, and GPTQ as written out in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import gptq, packing, uniform
from twla_jax.errors import TwlaError
from twla_jax.recipe import Recipe, load_recipe
from twla_jax.refinement_settings import EndToEndSettings, RefineSettings

N, M, TOKENS = 16, 40, 300


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, M)) @ (np.eye(M) + 0.3 * rng.normal(size=(M, M)))
    return rng.standard_t(5, (N, M)).astype(np.float32), (x.T @ x).astype(np.float32)


def quantize(name, weight, moment, group_size=16):
    recipe = dataclasses.replace(load_recipe(name).weights, group_size=group_size)
    return gptq.quantize_matrix(
        jnp.asarray(weight), jnp.asarray(moment), jnp.float32(TOKENS), settings=recipe
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_range_is_no_worse_than_the_whole_one(layer, bits):
    w, count = layer[0][:, :30], 2**bits - 1
    scale, zero = (
        np.asarray(p, np.float64)[:, None]
        for p in uniform.fit_range(jnp.asarray(w), jnp.ones(30, bool), bits)
    )
    low, high = np.minimum(w.min(1), 0)[:, None], np.maximum(w.max(1), 0)[:, None]
    whole = (high - low) / count

    def error(scale, zero):
        value = scale * (np.clip(np.round(w / scale) + zero, 0, count) - zero)
        return (np.abs(w - value) ** 2.4).sum(1)

    assert (scale == scale.astype(np.float16)).all()
    assert set(np.unique(zero)) <= set(range(count + 1))
    assert (error(scale, zero) <= error(whole, np.round(-low / whole)) * 1.06).all()


def test_gptq_is_gptq(layer):
    """Codes and ranges equal those of column-by-column GPTQ, each group's range taken from the weights it meets."""
    weight, moment = layer
    h = moment.astype(np.float64) / TOKENS
    h += 0.01 * np.diag(h).mean() * np.eye(M)
    inverse = np.linalg.cholesky(np.linalg.inv(h)).T
    w, expected = weight.astype(np.float64).copy(), np.zeros((N, M))
    for j in range(M):
        if j % 16 == 0:
            here = jnp.asarray(w[:, j : j + 16], jnp.float32)
            fitted = uniform.fit_range(here, jnp.ones(here.shape[1], bool), 3)
            scale, zero = (np.asarray(p, np.float64) for p in fitted)
        expected[:, j] = np.clip(np.round(w[:, j] / scale) + zero, 0, 7)
        error = (w[:, j] - scale * (expected[:, j] - zero)) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:]
    tensor, _ = quantize("gptq-int3", weight, moment)
    assert (
        np.asarray(tensor.codes) != expected
    ).mean() < 0.03  # float32 against float64 at ties, and what follows


def test_round_to_nearest_does_not_see_the_inputs(layer):
    weight, moment = layer
    tensor, figures = quantize("rtn-int4", weight, moment)
    blind, _ = quantize("rtn-int4", weight, np.eye(M, dtype=np.float32))
    np.testing.assert_array_equal(tensor.codes, blind.codes)
    step = np.asarray(tensor.scale, np.float32)[:, np.arange(M) // 16]
    inside = (np.asarray(tensor.codes) > 0) & (np.asarray(tensor.codes) < 15)
    assert (np.abs(weight - tensor.dequantize())[inside] <= 0.5001 * step[inside]).all()
    assert float(quantize("gptq-int4", weight, moment)[1]["output_error"]) < float(figures["output_error"])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [1, 5, 40])
def test_integers_lie_on_the_disk_without_gaps(bits, width):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 4, width)).astype(np.uint8)
    stored = packing.pack_bits(jnp.asarray(codes), bits)
    assert stored.shape == (3, 4, -(-width * bits // 8))
    np.testing.assert_array_equal(packing.unpack_bits(stored, bits, width), codes)
    row = sum(int(code) << (bits * place) for place, code in enumerate(codes[1, 2]))
    assert bytes(np.asarray(stored[1, 2])) == row.to_bytes(stored.shape[-1], "little")


def test_integers_are_not_refined():
    with pytest.raises(TwlaError, match=r"refine.end_to_end: integers are not refined"):
        Recipe(weights=load_recipe("rtn-int4").weights, refine=RefineSettings(end_to_end=EndToEndSettings()))
