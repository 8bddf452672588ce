"""The published layout as a tensor: what is stored is what was fitted, and errors go to later columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import e2m_atq, factors, grouped, masked_fit, packing, saliency

RNG = np.random.default_rng(1)


def problem(n=10, m=200):
    w = RNG.standard_t(4, (n, m)).astype(np.float32)
    x = RNG.normal(size=(600, m)) @ (np.eye(m) + RNG.normal(size=(m, m)) / np.sqrt(m))
    return w, (x.T @ x).astype(np.float32), x


@pytest.fixture(scope="module")
def quantized():
    w, moment, x = problem()
    tensor, figures = grouped.quantize_in_groups(w, moment, np.float32(600))
    return w, moment, x, tensor, figures


def test_the_first_block_is_the_fit_of_each_group(quantized):
    w, moment, _, tensor, _ = quantized
    exists = jnp.ones(200, bool)
    _, inverse, _ = jax.jit(factors.factor)(jnp.asarray(moment) / 600, exists, 0.1)
    block, metric = w[:, :128], (moment / 600)[:128, :128]
    masks = jax.jit(saliency.group_masks)(block, np.diagonal(inverse)[:128], metric, exists[:128])
    expected = np.zeros_like(block)
    for index, mask in enumerate(masks):
        fit = masked_fit.euclidean_two_planes if index < 2 else masked_fit.euclidean_one_plane
        scales, codes = jax.jit(fit)(block, mask)
        scales = jax.jit(masked_fit.relocate)(block, mask, scales, codes, metric)
        expected += np.asarray(masked_fit.values(scales, codes, mask))
    np.testing.assert_allclose(tensor.dequantize()[:, :128], expected, atol=2e-2)


def test_its_error_is_less_than_one_plane_alone_and_compensation_lowers_it(quantized):
    w, _, x, tensor, figures = quantized

    def energy(dense):
        return np.square(x @ (w - np.asarray(dense)).T.astype(np.float64)).sum()

    relative = energy(tensor.dequantize()) / np.square(x @ w.T.astype(np.float64)).sum()
    assert float(figures["output_error"]) == pytest.approx(relative, rel=1e-3)
    alone, _ = grouped.quantize_in_groups(w, np.eye(200, dtype=np.float32) * 600, np.float32(600))
    assert energy(tensor.dequantize()) < energy(alone.dequantize())
    alpha, mu, codes = jax.jit(e2m_atq.euclidean_fit)(jnp.asarray(w[:, :128]), jnp.ones(128, bool))
    plane = alpha[:, None] * codes + mu[:, None]
    assert np.square(w[:, :128] - tensor.dequantize()[:, :128]).sum() < np.square(w[:, :128] - plane).sum()


def test_room_for_salient_columns_can_be_cut_to_what_there_are(quantized):
    tensor = quantized[3]
    count = tensor.salient_count()
    assert count == np.unpackbits(np.asarray(tensor.salient), bitorder="little")[:200].sum()
    small = tensor.trimmed(count)
    assert small.residual_codes.shape[-1] == packing.packed_width(count)
    np.testing.assert_array_equal(small.dequantize(), tensor.dequantize())


def test_a_stack_of_layers_is_dequantized_as_each_alone(quantized):
    tensor = quantized[3]
    stack = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), tensor)
    assert stack.shape == (2, 10, 200)
    np.testing.assert_array_equal(jax.jit(lambda stack: stack.dequantize())(stack)[1], tensor.dequantize())
