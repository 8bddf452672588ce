"""What moves the latents: Adam, or for the codes of a matrix Muon."""

import jax
import numpy as np
import pytest

from twla_jax.refinement.schedule import optimizer, rates_at
from twla_jax.refinement_settings import EndToEndSettings

RATE = 3e-3
SETTINGS = EndToEndSettings(code_rate=RATE, code_optimizer="muon")


def first_updates(gradients, **form):
    rates = dict(SETTINGS.peak_rates)
    moves = optimizer(rates, learns_rotations=False, **form)
    return moves.update(gradients, moves.init(gradients), gradients)[0]


@pytest.fixture(scope="module")
def gradients():
    rng = np.random.default_rng(0)
    of = {"q": (2, 8, 12), "experts": (2, 3, 12, 8)}  # layers first, and experts
    return {
        name: {
            "u": rng.normal(size=shape).astype(np.float32),
            "s": rng.normal(size=(*shape[:-1], 1)).astype(np.float32),
        }
        for name, shape in of.items()
    }


def test_muon_moves_the_codes_of_each_matrix_by_an_orthogonal_one(gradients):
    for name, parts in first_updates(gradients).items():
        gradient, update = gradients[name]["u"], np.asarray(parts["u"])
        u, _, vt = np.linalg.svd(gradient, full_matrices=False)
        # Down the slope, along every singular vector of the gradient as far, to what five iterations give.
        along = -np.einsum("...ik,...ij,...kj->...k", u, update, vt)
        size = 0.2 * RATE * max(gradient.shape[-2:]) ** 0.5
        assert (0.6 * size < along).all()
        assert (along < 1.3 * size).all()
        np.testing.assert_allclose(
            update, -np.einsum("...ik,...k,...kj->...ij", u, along, vt), atol=1e-3 * size
        )


def test_its_steps_are_as_large_as_those_of_adam_usually_are(gradients):
    for parts in first_updates(gradients).values():
        root = np.sqrt((np.asarray(parts["u"]) ** 2).mean())
        assert root == pytest.approx(0.2 * RATE * np.sqrt(8 / 8), rel=0.25)


def test_scales_are_left_to_adam(gradients):
    for parts in first_updates(gradients).values():
        np.testing.assert_allclose(np.abs(parts["s"]), SETTINGS.scale_rate, rtol=1e-3)


def test_of_muon_the_narrow_form_is_near_the_wide_one(gradients):
    wide, narrow = (first_updates(gradients, narrow=flag) for flag in (False, True))
    for one, other in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
        assert np.linalg.norm(np.asarray(one) - other) < 0.02 * np.linalg.norm(one)


def test_products_in_bfloat16_change_muons_steps_little(gradients):
    wide, low = (first_updates(gradients, dtype=dtype) for dtype in ("float32", "bfloat16"))
    for one, other in zip(jax.tree.leaves(wide), jax.tree.leaves(low), strict=True):
        assert one.dtype == other.dtype
        assert np.linalg.norm(np.asarray(one) - other) < 0.1 * np.linalg.norm(one)


def test_the_rate_of_codes_goes_to_what_moves_them():
    assert rates_at(SETTINGS, 50, 100)["muon"] == pytest.approx(rates_at(SETTINGS, 50, 100)["scales"] * 1.5)
    assert "codes" not in SETTINGS.peak_rates
