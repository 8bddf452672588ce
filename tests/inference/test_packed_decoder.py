"""The decoder on packed weights and integer activations, against the same decoder as the quantiser left it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import twla_jax
from twla_jax.core import quantizers
from twla_jax.core.settings import (
    ActivationSettings,
    RotationSettings,
    TernarySettings,
    TwoPlaneSettings,
    WeightSettings,
)
from twla_jax.errors import TwlaError
from twla_jax.inference.generation import generate
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.models.blocks import State, run
from twla_jax.models.decoder import Decoder
from twla_jax.models.io import readers
from twla_jax.models.sites import set_activation_bits
from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.recipe import Recipe

from helpers import tiny

RECIPE = Recipe(
    name="quick",
    weights=WeightSettings(quantizer=TernarySettings(rounds=1)),
    rotation=RotationSettings(steps=5),
    activations=ActivationSettings(clips=(1.0, 0.8), clip_tokens=64),
)


@pytest.fixture(scope="module")
def quantised(stories):
    """stories260K quantised on its own text; 172 columns of its down linears are two groups, the second short."""
    model = readers.load_model(stories)
    prompt = np.full((2, 1), model.config.bos_token_id)
    text = generate(model, prompt, max_new_tokens=63, temperature=1.0, eos_token_ids=())
    return twla_jax.quantize(model, text.astype(np.int32), RECIPE, progress=False)[0], text


@jax.jit
def side_by_side(packed, block, state, context):
    """What a packed block's linears and the block's own make of the same states; its MLP at once and in parts."""
    pairs = []
    for index, site in enumerate(block.sites):
        found, expected = (
            each.outputs(site, each.transform(site)(each.before(site, state, context)))
            for each in (packed, block)
        )
        pairs += zip(found, expected, strict=True)
        if site.name == "mlp":
            hidden = jax.nn.silu(found[0]) * found[1]
            down = block.sites[index + 1]
            in_parts = packed.add_output(down, packed.transform(down)(hidden), state.x)
            mlp = run(packed, state, context, index).x, in_parts
        state = run(block, state, context, index, index + 1)
    return pairs, mlp, state


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_input_and_linear_computes_what_the_quantisers_own_does(quantised, bits):
    model, text = quantised
    model = jax.tree.map(jnp.asarray, set_activation_bits(model, bits))
    prepared = prepare_for_inference(model, unpack=False)
    state, context = State(model.embed_tokens(text)), model.context(text.shape[1])
    for i, packed in enumerate(prepared.blocks):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)
        pairs, mlp, state = side_by_side(packed, block, state, context.layer(i))
        for found, expected in pairs:
            np.testing.assert_allclose(found, expected, atol=1e-4)
        np.testing.assert_array_equal(*mlp)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-2), (8, 1e-2), (16, 1e-4)])
def test_perplexity_is_the_same(quantised, bits, tolerance):
    # So much, as codes on the edge between two levels are chaotic here: noise of 1e-6 on the embedding moves the
    # perplexity of this small model by 3e-3. Without codes there is no edge.
    model, text = quantised
    model = set_activation_bits(model, bits)
    scores = [
        twla_jax.evaluate(each, text, batch_size=2, progress=False)["perplexity"]
        for each in (model, prepare_for_inference(model, unpack=False))
    ]
    assert scores[1] == pytest.approx(scores[0], rel=tolerance)


def test_the_cache_changes_nothing(quantised):
    model = prepare_for_inference(set_activation_bits(quantised[0], 8), unpack=False)
    prompt = quantised[1][:, :5]
    found = generate(model, prompt, max_new_tokens=3, eos_token_ids=())
    logits = tiny.logits(model, np.concatenate([prompt, found], axis=1))
    np.testing.assert_array_equal(found, logits[:, 4:7].argmax(-1))


def test_a_token_alone_reads_words_and_finds_the_same_tokens(quantised):
    model = set_activation_bits(quantised[0], 16)
    prepared = prepare_for_inference(model, unpack=True)
    # Only these have 128 columns; a prompt is multiplied by floats.
    assert all(block.down_linear.words is not None for block in prepared.layers)
    prompt = quantised[1][:1, :5]
    found = generate(prepared, prompt, max_new_tokens=4, eos_token_ids=())
    logits = tiny.logits(model, np.concatenate([prompt, found], axis=1))
    np.testing.assert_array_equal(found, logits[:, 4:8].argmax(-1))


@pytest.mark.parametrize("tokens", [1, 3])
def test_an_exchange_changes_nothing(quantised, tokens):
    """That of a device whose kernels pass outputs on, where a block goes another way."""
    model = prepare_for_inference(set_activation_bits(quantised[0], 8), unpack=False)
    cache = model.init_cache(1, 64)
    words = jnp.zeros((1, 200), jnp.int32)
    scratch = tuple(dataclasses.replace(each, pair=words, qkv=words) for each in cache.scratch)
    other = dataclasses.replace(cache, scratch=scratch)
    step = jax.jit(lambda cache: model.decode(jnp.asarray(quantised[1][:1, :tokens]), cache))
    (found, after), (expected, _) = step(other), step(cache)
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, after.scratch, scratch)


def test_attention_in_parts_ends_a_block_as_the_whole_does(quantised):
    block = prepare_for_inference(set_activation_bits(quantised[0], 8), unpack=False).blocks[0]
    config, context = quantised[0].config, quantised[0].context(1).layer(0)
    finish = jax.jit(lambda block, x, mixed: run(block, State(x, mixed), context, 1).x)
    keys = jax.random.split(jax.random.key(0), 3)
    mixed = jax.random.normal(keys[0], (2, 3, config.num_heads * config.head_dim))
    softmax = jax.random.uniform(keys[1], (2, 3, config.num_heads, 2))
    parts, x = (
        AttentionSplits(mixed=mixed, softmax=softmax),
        jax.random.normal(keys[2], (2, 1, config.hidden_size)),
    )
    found, expected = (finish(block, x, each) for each in (parts, parts.merged()[:, None]))
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_linears_that_share_an_input_are_one_matrix(quantised):
    config = quantised[0].config
    block = prepare_for_inference(quantised[0], unpack=False).blocks[0]
    key = config.num_kv_heads * config.head_dim
    assert block.qkv_linear.weight.get_value().splits == (config.num_heads * config.head_dim, key, key)
    assert block.mlp_linear.weight.get_value().splits == (config.intermediate_size,) * 2


@pytest.mark.parametrize("bias", [False, True])
def test_a_float_model_computes_what_it_did(tiny_config, bias):
    config = dataclasses.replace(tiny_config, qkv_bias=bias, o_bias=bias, mlp_bias=bias)
    model = Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.float16)
    rng = np.random.default_rng(0)
    for name in (name for site in model.sites for name in site.linears if bias):
        linear = getattr(model.blocks, name)
        linear.bias = nnx.Param(jnp.asarray(rng.normal(size=linear.bias.shape), jnp.float16))
    tokens = rng.integers(0, config.vocab_size, (2, 7))
    packed = prepare_for_inference(model, unpack=False)
    np.testing.assert_allclose(tiny.logits(packed, tokens), tiny.logits(model, tokens), atol=1e-5)


def test_group_sizes_that_kernels_do_not_take_are_refused(tiny_ternary):
    with pytest.raises(TwlaError, match="group size 16"):
        prepare_for_inference(tiny_ternary, unpack=False)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 2e-2), (16, 2e-3)])
def test_two_planes_are_two_products(tiny_config, tiny_ternary, bits, tolerance):
    rng, layers = np.random.default_rng(0), tiny_config.num_layers
    levels = quantizers.quantizer(WeightSettings(quantizer=TwoPlaneSettings()))
    for name in (name for site in tiny_ternary.sites for name in site.linears):
        linear = getattr(tiny_ternary.blocks, name)
        n, m = linear.kernel.get_value().shape[-2:]
        alpha, mu = 0.1 * rng.uniform(0.5, 1, (2, layers, n, 1))
        scales = (alpha, alpha * rng.uniform(0.2, 0.8, alpha.shape), mu / 4)
        codes = jnp.asarray(rng.integers(-4, 5, (layers, n, m)))
        linear.kernel = nnx.Param(levels.pack(codes, tuple(map(jnp.asarray, scales)), 128))
    model = jax.tree.map(jnp.asarray, set_activation_bits(tiny_ternary, bits))
    tokens = rng.integers(0, tiny_config.vocab_size, (2, 16)).astype(np.int32)
    found, expected = (
        tiny.logits(each, tokens) for each in (prepare_for_inference(model, unpack=False), model)
    )
    difference = np.abs(np.asarray(found - expected))
    # α₂ meets the kernels in float16; at 8 bits a code on the edge of two levels may fall the other way.
    assert np.median(difference) < tolerance * np.asarray(expected).std()
