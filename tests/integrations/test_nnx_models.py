"""An NNX model that knows nothing of the library, quantised by rules on module paths."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from twla_jax.core.settings import CompensationSettings, RotationSettings, WeightSettings
from twla_jax.integrations import PackedKernel, TwlaRule, quantize_nnx, quantized_nnx_shapes
from twla_jax.integrations.providers import contraction

from helpers.flax_models import NnxAttentionLike, correlated_inputs, nearest_ternary, relative_error

RULES = [
    TwlaRule(
        module_path=r"layers/\d+|heads|down",
        weights=WeightSettings(group_size=16, compensation=CompensationSettings(propagation=0.0)),
        rotation=RotationSettings(steps=3),
    )
]


@pytest.fixture(scope="module")
def model():
    return NnxAttentionLike(nnx.Rngs(0))


@pytest.fixture(scope="module")
def quantized(model):
    return quantize_nnx(model, [correlated_inputs(seed) for seed in (1, 2, 3)], RULES)


@nnx.jit
def run(model, x):
    return model(x)


def test_outputs_are_nearer_than_those_of_rounding_to_nearest(model, quantized):
    x = correlated_inputs(9)
    rounded = nnx.clone(model)
    for module, contracted in ((rounded.layers[0], (0,)), (rounded.heads, (0,)), (rounded.down, (0, 1))):
        module.kernel[...] = jnp.asarray(nearest_ternary(module.kernel[...], contracted, 16), jnp.float32)
    exact = model(x)
    assert relative_error(run(quantized[0], x), exact) < 0.5 * relative_error(rounded(x), exact)


def test_matched_kernels_are_packed_and_the_callers_model_stays(model, quantized):
    packed, report = quantized
    for module in (packed.layers[0], packed.heads, packed.down):
        assert isinstance(module.kernel.get_value(), PackedKernel)
        assert module.kernel.get_value().tensor.codes.nbytes == 32 * 32 // 4
    np.testing.assert_array_equal(packed.head.kernel[...], model.head.kernel[...])
    assert set(report) == {"layers/0/kernel", "heads/kernel", "down/kernel"}
    assert type(model) is NnxAttentionLike
    assert not hasattr(model, "qwix_path")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))


def test_a_plain_orbax_checkpoint_restores_to_the_same_outputs(quantized, tmp_path):
    packed, _ = quantized
    x = correlated_inputs(9)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", nnx.state(packed))
    shapes = nnx.eval_shape(lambda: NnxAttentionLike(nnx.Rngs(0)))
    like = quantized_nnx_shapes(shapes, jax.ShapeDtypeStruct(x.shape, x.dtype), RULES)
    graph, state = nnx.split(like)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "packed", state))
    np.testing.assert_array_equal(run(restored, x), run(packed, x))


@pytest.mark.parametrize(
    "equation", ["bd,dh->bh", "...d,dhk->...hk", "bhk,hkd->db", "bkh,hkd->bd", "ab,ca->cb"]
)
def test_contractions_are_those_of_einsum(equation):
    sizes = dict(zip("abcdhk", (2, 3, 4, 5, 6, 7), strict=True))
    rng = np.random.default_rng(0)
    lhs, rhs = equation.split("->")[0].split(",")
    x, w = (rng.normal(size=[sizes[name] for name in names.replace("...", "ab")]) for names in (lhs, rhs))
    axes = contraction(equation, (x, w))
    np.testing.assert_allclose(
        np.tensordot(x, w, (axes.lhs, axes.rhs)).transpose(axes.order), np.einsum(equation, x, w), rtol=1e-12
    )


@pytest.mark.parametrize("equation", ["bhd,hdk->bhk", "bd,dh", "bd,de,ef->bf", "bd,kh->bdkh", "bd,dh->h"])
def test_what_is_no_plain_product_is_left_alone(equation):
    assert contraction(equation, (np.ones((2, 3)), np.ones((3, 4)))) is None
