"""Words of several integers each: one token's product with them, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core.tensors import IntegerTensor, dequantize, from_codes
from twla_jax.ops.word_product import fits_words, word_bytes, word_product, word_weight


def ternary(rng, n, m, group, *, planes):
    groups = -(-m // group)
    codes, second = rng.integers(-1, 2, (2, n, m)).astype(np.int8)
    alpha, mu = rng.uniform(0.5, 1, (n, groups)), rng.normal(0, 0.1, (n, groups))
    more = (second, alpha * rng.uniform(0.2, 1.2, (n, groups))) if planes == 2 else ()
    return from_codes(codes, alpha, mu, group, *more)


def integers(rng, n, m, group, *, bits):
    groups = -(-m // group)
    return IntegerTensor(
        codes=jnp.asarray(rng.integers(0, 2**bits, (n, m)), jnp.uint8),
        scale=jnp.asarray(rng.uniform(0.01, 0.02, (n, groups)), jnp.float16),
        zero_point=jnp.asarray(rng.integers(0, 2**bits, (n, groups)), jnp.uint8),
        in_features=m,
        group_size=group,
        bits=bits,
    )


@pytest.mark.parametrize(
    ("make", "m", "group", "setting"),
    [
        (ternary, 200, 128, {"planes": 1}),
        (ternary, 200, 128, {"planes": 2}),
        (ternary, 4300, 256, {"planes": 2}),  # in two parts
        (integers, 130, 130, {"bits": 8}),  # one scale a row
        (integers, 128, 128, {"bits": 3}),  # in fields of 4
    ],
)
def test_it_is_the_product_with_the_weights_for_which_the_words_stand(make, m, group, setting):
    rng = np.random.default_rng(m)
    kernels = [make(rng, n, m, group, **setting) for n in (3, 70)]
    x = rng.standard_normal((1, 1, m)).astype(np.float32)
    words = jax.jit(word_weight)(kernels)
    found = jax.jit(word_product)(x, words)
    assert found.shape == (1, 1, 73)
    dense = np.concatenate([np.asarray(dequantize(kernel), np.float64) for kernel in kernels])
    # Each number that is added up is rounded a few times, and q, which is not negative, cancels against the offset.
    bound = 40 * 2.0**-24 * (np.abs(x[0, 0]).sum() * np.abs(dense).max())
    np.testing.assert_allclose(found[0, 0], dense @ x[0, 0].astype(np.float64), rtol=0, atol=bound)
    assert word_bytes(kernels[1]) == sum(leaf.nbytes for leaf in jax.tree.leaves(words))


def test_what_has_other_groups_or_none_does_not_fit():
    rng = np.random.default_rng(0)
    one, two = (ternary(rng, 4, 256, 128, planes=planes) for planes in (1, 2))
    assert fits_words([one, one])
    assert not fits_words([one, two])
    assert not fits_words([ternary(rng, 4, 256, 64, planes=1)])
    assert not fits_words([np.zeros((256, 4), np.float32)])
