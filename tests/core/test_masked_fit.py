"""The published layout's groups and fits, against the published steps written out in numpy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import masked_fit, saliency

RNG = np.random.default_rng(0)


def weights(n=12, g=128, heavy=False):
    w = RNG.standard_t(3, (n, g)) if heavy else RNG.normal(size=(n, g))
    w[:, :5] *= 4
    x = RNG.normal(size=(400, g)) @ (np.eye(g) + 0.3 * RNG.normal(size=(g, g)) / np.sqrt(g))
    moment = x.T @ x
    upper = np.linalg.cholesky(np.linalg.inv(moment / 400 + 0.1 * np.eye(g))).T
    return w.astype(np.float32), np.diagonal(upper).astype(np.float32), moment.astype(np.float32)


def row_term(x):
    """Mean, codes and α of a vector."""
    mu = x.mean() if x.size else 0.0
    c = x - mu
    t = np.sign(c) * (np.abs(c) > 0.75 * np.abs(c).mean()) if x.size else c
    return mu, t, (t * c).sum() / (np.abs(t).sum() + 1e-8)


def greedy(x, mask, terms):
    out = np.zeros_like(x)
    for r in range(len(x)):
        chosen, total = mask[r], np.zeros(mask[r].sum())
        for _ in range(terms):
            mu, t, alpha = row_term(x[r, chosen] - total)
            total = total + mu + alpha * t
        out[r, chosen] = total
    return out


def one_plane(x, steps=15):
    mu, t, alpha = row_term(x)
    for _ in range(steps if x.size else 0):
        mu = mu + (x - mu - alpha * t).mean()
        c = x - mu
        t = np.sign(c) * (np.abs(c) > 0.75 * np.abs(c).mean())
        alpha = (t * c).sum() / (np.abs(t).sum() + 1e-8)
    return mu, alpha, t


def two_planes(x, steps=15):
    mu, first, a = row_term(x)
    rest = x - mu - a * first
    second = np.sign(rest) * (np.abs(rest) > 0.75 * np.abs(rest).mean()) if x.size else rest
    b = (second * rest).sum() / (np.abs(second).sum() + 1e-8)
    pairs = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    for _ in range(steps if x.size else 0):
        mu = mu + (x - mu - a * first - b * second).mean()
        c = x - mu
        a = (first * (c - b * second)).sum() / (np.abs(first).sum() + 1e-8)
        b = (second * (c - a * first)).sum() / (np.abs(second).sum() + 1e-8)
        nearest = np.argmin([np.abs(c - i * a - j * b) for i, j in pairs], axis=0)
        first, second = (np.array([pair[k] for pair in pairs])[nearest] for k in (0, 1))
    return mu, a, b, first, second


def masks(w, diagonal, moment):
    """The four groups, one candidate after the other."""
    a = w.astype(np.float64) ** 2 / diagonal.astype(np.float64) ** 2
    order = np.argsort(-a.sum(0), kind="stable")
    best = (np.inf, None)
    for count in range(1, 64):
        chosen = np.zeros(a.shape, bool)
        chosen[:, order[:count]] = True
        error = ((a - greedy(a, chosen, 2) - greedy(a, ~chosen, 2)) ** 2).mean()
        best = min(best, (error, count))
    inside = np.zeros(a.shape, bool)
    inside[:, order[: best[1]]] = True
    quantiles = np.linspace(0.10, 0.90, 81)

    def split(candidates, mask, terms, error):
        found = [
            error(greedy(a, mask & (a >= q), terms) + greedy(a, mask & (a < q), terms)) for q in candidates
        ]
        return candidates[int(np.argmin(found))]

    threshold = split(
        np.quantile(a[inside & (a != 0)], quantiles),
        inside,
        2,
        lambda fit: ((np.where(inside, a, 0) - fit) ** 2).mean(),
    )
    salient = np.zeros_like(a)
    for r in range(len(a)):
        mu, alpha, beta, first, second = two_planes(a[r, inside[r]])
        salient[r, inside[r]] = mu + alpha * first + beta * second

    def energy(fit):
        rest = a - fit - salient
        return np.sum((rest.T @ rest) * moment)

    other = split(np.quantile(np.where(inside, 0, a), quantiles), ~inside, 1, energy)
    return np.stack(
        [inside & (a >= threshold), inside & (a < threshold), ~inside & (a >= other), ~inside & (a < other)]
    )


@pytest.mark.parametrize("heavy", [False, True])
def test_the_four_groups_are_the_published_ones(heavy):
    w, diagonal, moment = weights(heavy=heavy)
    found = np.asarray(jax.jit(saliency.group_masks)(w, diagonal, moment, np.ones(128, bool)))
    expected = masks(w, diagonal, moment)
    # Candidates of nearly equal error may swap in float32; no more than one element in a hundred then changes group.
    assert (found != expected).mean() < 0.01


@pytest.mark.parametrize("existing", [128, 64, 17])
def test_the_groups_partition_the_columns_that_exist(existing):
    w, diagonal, moment = weights(n=6, heavy=True)
    mask = np.arange(128) < existing
    found = np.asarray(jax.jit(saliency.group_masks)(w, diagonal, moment, mask))
    np.testing.assert_array_equal(found.sum(0), np.broadcast_to(mask, w.shape))
    salient = found[:2].any(0)
    assert (salient == salient[:1]).all()
    assert 1 <= salient[0].sum() < min(64, existing)


def test_fits_of_masked_elements_are_the_published_ones():
    w, _, _ = weights(n=8)
    mask = RNG.random(w.shape) < 0.4
    mask[3] = False  # a row without elements
    (mu, alpha), (codes,) = masked_fit.euclidean_one_plane(jnp.asarray(w), jnp.asarray(mask))
    two, (first, second) = masked_fit.euclidean_two_planes(jnp.asarray(w), jnp.asarray(mask))
    for r, chosen in enumerate(mask):
        x = w[r, chosen].astype(np.float64)
        expected = one_plane(x)
        np.testing.assert_allclose([mu[r], alpha[r]], expected[:2], atol=1e-5)
        np.testing.assert_array_equal(codes[r][chosen], expected[2])
        *scales, t0, t1 = two_planes(x)
        np.testing.assert_allclose([p[r] for p in two], scales, atol=1e-5)
        np.testing.assert_array_equal(first[r][chosen], t0)
        np.testing.assert_array_equal(second[r][chosen], t1)
    assert not np.asarray(codes)[~mask].any()


@pytest.mark.parametrize("fit", [masked_fit.euclidean_one_plane, masked_fit.euclidean_two_planes])
def test_relocation_takes_the_published_coordinate_steps(fit):
    w, _, moment = weights(n=6)
    mask = RNG.random(w.shape) < 0.5
    scales, codes = fit(jnp.asarray(w), jnp.asarray(mask))
    found = masked_fit.relocate(jnp.asarray(w), jnp.asarray(mask), scales, codes, jnp.asarray(moment))
    for r, chosen in enumerate(mask):
        s = moment.astype(np.float64)[np.ix_(chosen, chosen)]
        x = w[r, chosen].astype(np.float64)
        basis = [np.ones(chosen.sum()), *(np.asarray(c[r], np.float64)[chosen] for c in codes)]
        p = [float(q[r]) for q in scales]
        for _ in range(15):
            for i, vector in enumerate(basis):
                others = sum((p[j] * basis[j] for j in range(len(p)) if j != i), np.zeros(len(x)))
                p[i] = vector @ s @ (x - others) / (vector @ s @ vector)
        np.testing.assert_allclose([q[r] for q in found], p, rtol=1e-3, atol=1e-4)
