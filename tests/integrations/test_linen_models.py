"""A Linen model that knows nothing of the library, quantised by rules on module paths."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from twla_jax.core.settings import ActivationSettings, CompensationSettings, RotationSettings, WeightSettings
from twla_jax.core.tensors import TernaryTensor, dequantize
from twla_jax.errors import TwlaError
from twla_jax.integrations import PackedKernel, TwlaRule, quantize_linen, quantized_linen_shapes

from helpers.flax_models import LinenAttentionLike, correlated_inputs, nearest_ternary, relative_error

WEIGHTS = WeightSettings(group_size=16, compensation=CompensationSettings(propagation=0.0))
RULES = [TwlaRule(module_path="up|heads|down", weights=WEIGHTS, rotation=RotationSettings(steps=3))]
CONTRACTED = {"up": (0,), "heads": (0,), "down": (0, 1)}


@pytest.fixture(scope="module")
def floats():
    model = LinenAttentionLike()
    return model, model.init(jax.random.key(0), correlated_inputs(0))


@pytest.fixture(scope="module")
def quantized(floats):
    batches = [correlated_inputs(seed) for seed in (1, 2, 3)]
    return quantize_linen(*floats, batches, RULES)


def test_outputs_are_nearer_than_those_of_rounding_to_nearest(floats, quantized):
    model, variables = floats
    packed_model, packed, _ = quantized
    x = correlated_inputs(9)
    rounded = {
        name: {**leaves, "kernel": nearest_ternary(leaves["kernel"], CONTRACTED[name], 16)}
        if name in CONTRACTED
        else leaves
        for name, leaves in variables["params"].items()
    }
    exact = model.apply(variables, x)
    ours = relative_error(jax.jit(packed_model.apply)(packed, x), exact)
    assert ours < 0.5 * relative_error(model.apply({"params": rounded}, x), exact)


def test_matched_kernels_are_packed_and_others_stay(floats, quantized):
    _, variables = floats
    _, packed, report = quantized
    for name, leaves in packed["params"].items():
        if name not in CONTRACTED:
            jax.tree.map(np.testing.assert_array_equal, leaves, variables["params"][name])
            continue
        kernel = leaves["kernel"]
        assert isinstance(kernel, PackedKernel)
        assert isinstance(kernel.tensor, TernaryTensor)
        assert kernel.shape == variables["params"][name]["kernel"].shape
        assert kernel.tensor.codes.nbytes == 32 * 32 // 4
    assert set(report) == {f"{name}/kernel" for name in CONTRACTED}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))


def test_a_plain_orbax_checkpoint_restores_to_the_same_outputs(floats, quantized, tmp_path):
    model, variables = floats
    packed_model, packed, _ = quantized
    x = correlated_inputs(9)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", packed)
    shapes = jax.eval_shape(lambda: variables)
    like_model, like = quantized_linen_shapes(model, shapes, jax.ShapeDtypeStruct(x.shape, x.dtype), RULES)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "packed", like)
    assert jax.tree.structure(restored) == jax.tree.structure(packed)
    np.testing.assert_array_equal(
        jax.jit(like_model.apply)(restored, x), jax.jit(packed_model.apply)(packed, x)
    )


def test_rotation_and_activation_codes_are_applied_at_the_call(floats):
    model, variables = floats
    rule = TwlaRule(
        module_path="head",
        weights=WEIGHTS,
        rotation=RotationSettings(steps=0),
        activations=ActivationSettings(bits=4, clips=(1.0,)),
    )
    x = correlated_inputs(4)
    packed_model, packed, _ = quantize_linen(model, variables, [x], [rule])
    kernel = packed["params"]["head"]["kernel"]
    _, captured = model.apply(variables, x, capture_intermediates=True)
    inputs = np.asarray(captured["intermediates"]["down"]["__call__"][0], np.float64)
    left, right = (np.asarray(factor, np.float64) for factor in (kernel.rotation.left, kernel.rotation.right))
    rotated = (left @ inputs.reshape(-1, len(left), len(right)) @ right).reshape(inputs.shape)
    low, high = rotated.min(1, keepdims=True), rotated.max(1, keepdims=True)
    scale = (high - low) / 15
    zero = np.round(-low / scale)
    codes = np.clip(np.round(rotated / scale) + zero, 0, 15)
    expected = scale * (codes - zero) @ np.asarray(dequantize(kernel.tensor), np.float64).T
    expected += np.asarray(variables["params"]["head"]["bias"])
    # A code half way between two may fall to either side in float32.
    differs = np.abs(np.asarray(packed_model.apply(packed, x)) - expected) > 1e-4 * np.abs(expected).max()
    assert differs.any(1).mean() < 0.03


def test_a_rule_that_matches_nothing_is_refused_by_name(floats):
    model, variables = floats
    with pytest.raises(TwlaError, match=r"rule 'q_proj' matches no linear .* up, heads, down, head$"):
        quantize_linen(model, variables, [correlated_inputs(0)], [TwlaRule(module_path="q_proj")])


def test_refusals(floats):
    model, variables = floats
    with pytest.raises(TwlaError, match="no batch"):
        quantize_linen(model, variables, [], RULES)
    with pytest.raises(TwlaError, match=r"set weights\.compensation\.propagation to 0"):
        TwlaRule(weights=WeightSettings())
    with pytest.raises(TwlaError, match="TwlaRule does not read weight_qtype"):
        TwlaRule(weight_qtype=jnp.int4)
    with pytest.raises(TwlaError, match="not finite"):
        quantize_linen(model, variables, [jnp.full((96, 32), jnp.nan)], RULES)


def test_without_qwix_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(TwlaError, match=r"^TwlaRule needs the package qwix: pip install 'twla-jax\[qwix\]'$"):
        from twla_jax.integrations import TwlaRule as _  # noqa: F401
