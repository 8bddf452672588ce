"""The decoder's own promises: caching, replaced weights, transformed inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twla_jax.core.tensors import TernaryTensor, dequantize
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention import fused, reference
from twla_jax.ops.attention.kv_cache import LayerKV

forward = jax.jit(lambda model, tokens: model(tokens))
decode = jax.jit(lambda model, tokens, cache: model.decode(tokens, cache))


@pytest.fixture(scope="module")
def config():
    return DecoderConfig(
        model_type="qwen3",
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        qk_norm=True,
        sliding_window=5,
        sliding_layers=(1,),
    )


@pytest.fixture(scope="module")
def model(config):
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens(config):
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, 12))


def test_decoding_with_a_cache_equals_the_whole_forward(model, tokens):
    cache = model.init_cache(2, 16)
    parts = []
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 11), (11, 12)):
        hidden, cache = decode(model, tokens[:, start:end], cache)
        parts.append(hidden)
    assert cache.length == 12
    logits = model.logits(jnp.concatenate(parts, axis=1))
    np.testing.assert_allclose(logits, forward(model, tokens), atol=1e-5)


def test_rows_may_be_at_positions_of_their_own(model, tokens):
    _, cache = decode(model, tokens[:, :7], model.init_cache(2, 16))
    cache = dataclasses.replace(cache, length=jnp.array([7, 4]))
    expected = np.asarray(forward(model, tokens))
    for step in range(3):
        following = jnp.array([tokens[0, 7 + step], tokens[1, 4 + step]])
        hidden, cache = decode(model, following[:, None], cache)
        found = model.logits(hidden[:, 0])
        np.testing.assert_allclose(found, [expected[0, 7 + step], expected[1, 4 + step]], atol=1e-5)
    np.testing.assert_array_equal(cache.length, [10, 7])


def test_a_chunk_of_queries_at_a_time_changes_nothing(model, tokens, monkeypatch):
    whole = model(tokens)
    monkeypatch.setattr(reference, "_QUERY_CHUNK", 5)  # which does not divide 12
    np.testing.assert_allclose(model(tokens), whole, atol=1e-5)


def test_a_later_token_changes_no_earlier_logits(model, tokens):
    changed = tokens.copy()
    changed[:, 8] += 1
    before, after = forward(model, tokens), forward(model, changed % 61)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8:] - after[:, 8:]).max() > 1e-3


def test_the_parts_of_a_block_compose_to_the_block(model, tokens):
    block = jax.tree.map(lambda leaf: leaf[1], model.blocks)
    context = model.context(12).layer(1)
    x = model.embed_tokens(tokens)
    q, k, v = block.project(block.outputs(block.sites[0], block.input_norm(x)), context.positions)
    kv = LayerKV(entries=jnp.stack([k, v]).swapaxes(2, 3))
    y = x + block.o(reference.attention(q, kv, context.positions, jnp.int32(5)))
    h = block.post_norm(y)
    y = y + block.down(jax.nn.silu(block.gate(h)) * block.up(h))
    np.testing.assert_allclose(y, block(x, context), atol=1e-6)


def test_packed_weights_give_the_logits_of_their_dequantised_values(tiny_ternary, tokens):
    dense = jax.tree.map(lambda leaf: leaf, tiny_ternary)
    for name in (name for site in dense.sites for name in site.linears):
        linear = getattr(dense.blocks, name)
        assert isinstance(linear.kernel.get_value(), TernaryTensor)
        linear.kernel = nnx.Param(dequantize(linear.kernel.get_value()).swapaxes(-1, -2))
    # Float sums in another order can flip a rounding of the activation quantiser, so it is left out.
    for site in dense.sites:
        for each in (dense, tiny_ternary):
            each.blocks.transform(site).activation = None
    packed = forward(tiny_ternary, tokens)
    np.testing.assert_allclose(packed, forward(dense, tokens), atol=1e-4 * np.abs(packed).max())


def test_inputs_are_rotated_then_quantised(tiny_ternary, tokens):
    block = jax.tree.map(lambda leaf: leaf[0], tiny_ternary.blocks)
    x = tiny_ternary.embed_tokens(tokens)
    rotation, quantizer = block.mlp_input.rotation.get_value(), block.mlp_input.activation.get_value()
    np.testing.assert_array_equal(block.mlp_input(x), quantizer(rotation(x)))
    off = jax.tree.map(lambda leaf: leaf, tiny_ternary)
    for site in off.sites:
        transform = off.blocks.transform(site)
        transform.activation = nnx.Param(dataclasses.replace(transform.activation.get_value(), enabled=False))
    assert np.abs(forward(off, tokens) - forward(tiny_ternary, tokens)).max() > 1e-3


def test_the_abstract_model_has_the_same_leaves(config, model):
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(abstract) == jax.tree.structure(model)
    assert all(leaf.shape[0] == config.num_layers for leaf in jax.tree.leaves(abstract.blocks))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float16, 0.02), (jnp.bfloat16, 0.1)])
def test_narrow_dtypes_compute_in_themselves_and_return_float32_logits(
    config, model, tokens, dtype, tolerance
):
    narrow = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)
    assert narrow.hidden(tokens).dtype == dtype
    logits, exact = forward(narrow, tokens), forward(model, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=tolerance * np.abs(exact).max())


def test_fused_attention_is_that_of_the_chunks():
    """Through JAX's own reference; cuDNN's kernels behind the same function exist on GPUs alone."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 9, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    at = jnp.arange(9)
    positions = reference.Positions(query=at, key=at, cos=None, sin=None)
    kv = LayerKV(entries=jnp.stack([k, v]).swapaxes(2, 3))
    expected = reference.attention(q, kv, positions, jnp.int32(2**30))
    np.testing.assert_allclose(fused.fused_attention(q, k, v, implementation="xla"), expected, atol=1e-5)
    for window, reach in ((3, 3), (3, 2**30), (9, 9)):
        expected = reference.attention(q, kv, positions, jnp.int32(reach))
        found = fused.windowed_attention(q, k, v, jnp.int32(reach), window, implementation="xla")
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_span_of_layers_keeps_each_layers_reach_and_rotary_angles():
    settings = DecoderConfig(
        model_type="gemma3_text", vocab_size=8, hidden_size=16, intermediate_size=16, num_layers=4, num_heads=2,
        num_kv_heads=1, head_dim=8, qk_norm=True, sliding_window=3, sliding_layers=(0, 2), sliding_rope_theta=100.0,
        no_rope_layers=(3,),
    )  # fmt: skip
    context = Decoder(settings, rngs=nnx.Rngs(0)).context(6)
    for index in range(4):
        alone = context.layer(index)
        for name, one in (("reach", alone.reach), ("cos", alone.positions.cos), ("sin", alone.positions.sin)):
            again = context.span(1, 3).layer(index - 1) if index else context.span(0, 1).layer(0)
            other = again.reach if name == "reach" else getattr(again.positions, name)
            np.testing.assert_array_equal(one, other)
    cosines = [np.asarray(context.layer(index).positions.cos) for index in range(4)]
    np.testing.assert_array_equal(cosines[0], cosines[2])
    assert not np.array_equal(cosines[0], cosines[1])
    assert (cosines[3] == 1).all()
