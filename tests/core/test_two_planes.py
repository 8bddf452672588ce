"""Two ternary planes against brute force in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twla_jax.core import gptq, kotms, tensors, two_planes
from twla_jax.core.quantizers import quantizer
from twla_jax.core.settings import TernarySettings, TwoPlaneSettings, WeightSettings
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.recipe import Recipe, load_recipe
from twla_jax.storage import accounting, checkpoint

DIGITS = np.arange(-4, 5)
TWO = WeightSettings(quantizer=TwoPlaneSettings(), group_size=16)

# One program each; their operations would each be compiled for every shape.
nearest_codes, values, relocate, euclidean_fit, ordered = map(
    jax.jit,
    (
        two_planes.nearest_codes,
        two_planes.values,
        two_planes.relocate,
        two_planes.euclidean_fit,
        two_planes.ordered,
    ),
)
dense = jax.jit(tensors.dequantize)


def levels(alpha, residual_alpha, mu):
    """The nine of them, in the order of DIGITS, from the definition."""
    pairs = [
        (first, digit - 3 * first) for digit in DIGITS for first in (-1, 0, 1) if abs(digit - 3 * first) <= 1
    ]
    return np.stack([alpha * first + residual_alpha * second + mu for first, second in pairs], -1)


@pytest.mark.parametrize(
    "scales", [(1.2, 0.4, 0.1), (0.5, 0.9, 0.0), (-1.0, 0.3, 0.2), (1.0, 0.0, 0.0), (1.0, 1.0, 0.3)]
)
def test_codes_are_the_nearest_of_all_nine_levels(scales):
    w = np.random.default_rng(0).normal(size=(40, 30))
    codes = np.asarray(nearest_codes(jnp.asarray(w, jnp.float32), *scales))
    assert set(np.unique(codes)) <= set(DIGITS)
    best = np.abs(w[..., None] - levels(*map(np.float64, scales))).min(-1)
    got = np.abs(w - np.asarray(values(jnp.asarray(codes), *scales), np.float64))
    np.testing.assert_allclose(got, best, atol=1e-6)


def test_relocation_is_least_squares():
    rng = np.random.default_rng(0)
    w, codes = rng.normal(size=(20, 24)), rng.integers(-4, 5, (20, 24))
    x = rng.normal(size=(100, 24)) @ rng.normal(size=(24, 24))
    arrays = [jnp.asarray(a, jnp.float32) for a in (w, codes)]
    start = (jnp.ones(20), jnp.ones(20), jnp.zeros(20))
    got = relocate(*arrays, start, jnp.asarray(x.T @ x, jnp.float32), jnp.ones(24, bool))
    for row in range(20):
        first = np.round(codes[row] / 3)
        basis = np.stack([first, codes[row] - 3 * first, np.ones(24)], 1)
        expected = np.linalg.lstsq(x @ basis, x @ w[row], rcond=None)[0]
        np.testing.assert_allclose([p[row] for p in got], expected, rtol=2e-3, atol=2e-3)


def test_relocation_never_raises_the_error_even_where_planes_coincide():
    rng = np.random.default_rng(1)
    w = rng.normal(size=(30, 12)) * 10.0 ** rng.integers(-3, 3, (30, 1))
    codes = rng.integers(-4, 5, (30, 12))
    codes[:10] = rng.choice([-4, 0, 4], (10, 12))  # T₁ = T₂ everywhere
    codes[10:12] = 0
    x = rng.normal(size=(5, 12))
    s = x.T @ x
    old = (np.abs(w).mean(1), 0.3 * np.abs(w).mean(1), w.mean(1))

    def error(scales):
        e = w - np.asarray(
            values(jnp.asarray(codes), *(jnp.asarray(p, jnp.float32)[:, None] for p in scales))
        )
        return np.einsum("ni,ij,nj->n", e, s, e)

    new = relocate(
        *(jnp.asarray(a, jnp.float32) for a in (w, codes)),
        tuple(jnp.asarray(p, jnp.float32) for p in old),
        jnp.asarray(s, jnp.float32),
        jnp.ones(12, bool),
    )
    assert np.isfinite(np.asarray(new)).all()
    assert (error(new) <= error(old) + 1e-5 * np.einsum("ni,ij,nj->n", w, s, w)).all()


def test_the_fit_is_near_the_best_of_all_codes():
    """Rows of five weights: every one of 9⁵ digit strings with its own least squares, in float64."""
    w = np.random.default_rng(2).normal(size=(12, 5)) * np.array([1.0, 1, 1, 1, 3])
    strings = np.array(list(itertools.product(DIGITS, repeat=5)))
    first = np.round(strings / 3)
    basis = np.stack([first, strings - 3 * first, np.ones_like(first)], -1)
    u, singular, _ = np.linalg.svd(basis, full_matrices=False)
    u = u * (singular > 1e-9)[:, None, :]
    explained = np.square(np.einsum("skr,nk->nsr", u, w)).sum(-1).max(1)
    best = np.square(w).sum(1) - explained
    scales, codes = euclidean_fit(jnp.asarray(w, jnp.float32), jnp.ones(5, bool))
    fitted = np.asarray(values(codes, *(p[:, None] for p in scales)))
    error = np.square(w - fitted).sum(1)
    energy = np.square(w - w.mean(1, keepdims=True)).sum(1)
    assert (error >= best - 1e-5).all()
    # The best of 59049 strings all but interpolates five weights; one plane leaves 6 % of them, this fit under 2 %.
    assert ((error - best) / energy).mean() < 0.02


def test_masked_columns_do_not_touch_the_fit():
    w = np.random.default_rng(3).normal(size=(8, 10)).astype(np.float32)
    short = euclidean_fit(jnp.asarray(w), jnp.ones(10, bool))
    padded = np.pad(w, ((0, 0), (0, 5)), constant_values=99.0)
    masked = euclidean_fit(jnp.asarray(padded), jnp.arange(15) < 10)
    np.testing.assert_allclose(masked[0], short[0], rtol=1e-4, atol=1e-5)
    assert not np.asarray(masked[1])[:, 10:].any()


def test_order_and_signs_leave_the_levels():
    rng = np.random.default_rng(6)
    codes, scales = (
        rng.integers(-4, 5, (30, 8)).astype(np.float32),
        rng.normal(size=(3, 30)).astype(np.float32),
    )
    before = values(jnp.asarray(codes), *jnp.asarray(scales)[..., None])
    new_codes, new = ordered(jnp.asarray(codes), tuple(jnp.asarray(scales)))
    np.testing.assert_allclose(values(new_codes, *(p[:, None] for p in new)), before, atol=1e-6)
    assert (new[0] >= new[1]).all()
    assert (new[1] >= 0).all()


@pytest.mark.parametrize("group_size", [0, 16])
def test_two_planes_are_never_worse_than_one_on_the_same_layer(group_size):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 40)) @ (np.eye(40) + 0.3 * rng.normal(size=(40, 40)))
    weight, moment = jnp.asarray(rng.standard_t(5, (24, 40)), jnp.float32), jnp.asarray(x.T @ x, jnp.float32)
    error = {}
    for planes in (1, 2):
        kind = TwoPlaneSettings() if planes == 2 else TernarySettings()
        recipe = WeightSettings(quantizer=kind, group_size=group_size)
        tensor, figures = gptq.quantize_matrix(weight, moment, jnp.float32(400), settings=recipe)
        e = np.asarray(weight - dense(tensor), np.float64)
        error[planes] = np.einsum("ni,ij,nj->n", e, x.T @ x, e)
        assert float(figures["output_error"]) == pytest.approx(
            error[planes].sum() / np.square(x @ np.asarray(weight).T).sum(), rel=1e-3
        )
    assert (error[2] < error[1]).all()
    assert error[2].sum() < 0.25 * error[1].sum()


def test_planes_are_packed_apart_and_add_up():
    rng = np.random.default_rng(5)
    codes = rng.integers(-4, 5, (6, 21))
    alpha, mu = rng.uniform(0.5, 2, (6, 2)).astype(np.float16), rng.normal(size=(6, 2)).astype(np.float16)
    scales = (alpha, alpha.astype(float) * rng.integers(0, 256, (6, 2)) / 200, mu)
    tensor = quantizer(TWO).pack(
        jnp.asarray(codes, jnp.float32), tuple(jnp.asarray(p, jnp.float32) for p in scales), 16
    )
    alpha, residual_alpha, mu = (p.astype(np.float64)[:, np.arange(21) // 16] for p in scales)
    expected = np.take_along_axis(levels(alpha, residual_alpha, mu), codes[..., None] + 4, -1)[..., 0]
    np.testing.assert_allclose(dense(tensor), expected, atol=1e-5)
    first, second = tensor.planes()
    np.testing.assert_allclose(dense(first) + dense(second), expected, atol=2e-3)
    assert second.mu is None


def test_smollm2s_shapes_take_at_most_3_6_bits_all_in(tmp_path):
    """One block of its thirty: codes, three scales a group, rotations and clips, from the bytes on the disk."""
    config = DecoderConfig(
        model_type="llama",
        vocab_size=8,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=1,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.float16)
    recipe = load_recipe("w2x1.58-g128")
    pack = jax.jit(quantizer(recipe.weights).pack, static_argnums=2)
    for site in model.sites:
        for name in site.linears:
            linear = getattr(model.blocks, name)
            _, m, n = linear.kernel.get_value().shape
            groups = jnp.ones((1, n, -(-m // 128)))
            linear.kernel = nnx.Param(pack(jnp.zeros((1, n, m)), (groups, groups, groups), 128))
        sizes = kotms.factor_sizes(m, n, recipe.rotation.factors)
        left, right = (jnp.zeros((1, size, size), jnp.float16) for size in sizes)
        transform = model.blocks.transform(site)
        transform.rotation = nnx.data(nnx.Param(kotms.KroneckerRotation(left, right)))
    checkpoint.save(model, None, tmp_path / "out", Recipe(), {})
    account = accounting.account(tmp_path / "out")
    assert account["bytes_accounted"] == account["bytes_on_disk"]
    assert 3.5 < account["bits_per_weight_linear"] <= 3.6
