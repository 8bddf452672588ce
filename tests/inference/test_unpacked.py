"""Weights unpacked once, as on a CPU: the same numbers, the same roundings of activations, and only where they fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twla_jax.core.tensors import dequantize
from twla_jax.errors import TwlaError
from twla_jax.inference import execution, unpacked
from twla_jax.inference.packed_decoder import PackedDecoder, prepare_for_inference
from twla_jax.models.decoder import Decoder
from twla_jax.models.sharding import make_mesh
from twla_jax.quantization.embedding import quantize_embeddings
from twla_jax.recipe import EmbeddingSettings


@pytest.fixture
def model(tiny_ternary):
    """Inputs of 4 or 8 bits, groups that no kernel takes, and an embedding of integers."""
    return jax.tree.map(jnp.asarray, quantize_embeddings(tiny_ternary, EmbeddingSettings(bits=8)))


def test_it_computes_what_the_packed_model_does(model):
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 9))
    prepared = prepare_for_inference(model)
    found, expected = (jax.jit(lambda model: model(tokens))(each) for each in (prepared, model))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    # The weights are the very numbers; bits of activations differ from layer to layer, and count.
    down = dequantize(jax.tree.map(lambda leaf: leaf[1], model.blocks.down.kernel.get_value()), jnp.float32)
    np.testing.assert_array_equal(prepared.layers[1].down_linear.weight.get_value(), down)
    assert {leaf.dtype for leaf in jax.tree.leaves(prepared) if leaf.size > 999} == {jnp.dtype("float32")}
    with pytest.raises(TwlaError, match="one device only"):
        prepare_for_inference(model, unpack=True, mesh=make_mesh("model=1"))


def test_a_cpu_unpacks_what_fits(model, monkeypatch):
    prepared, words = execution.for_inference(model, "auto")
    matrices = sum(each.nbytes for each in jax.tree.leaves(prepared) if each.size > 999)
    assert words == f"the quantiser's own arithmetic, weights unpacked, {matrices / 1e9:.2f} GB"
    monkeypatch.setattr(unpacked, "host_bytes", lambda: 2 * matrices - 2)
    assert execution.for_inference(model, "auto") == (model, "the quantiser's own arithmetic")
    assert execution.for_inference(model, "off")[0] is model


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_integers_gives_one_token_the_logits_of_its_floats(tiny_config, tied):
    config = dataclasses.replace(tiny_config, hidden_size=160, num_layers=1, tie_word_embeddings=tied)
    plain = Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    prepared = prepare_for_inference(quantize_embeddings(plain, EmbeddingSettings(bits=8)), unpack=True)
    assert isinstance(prepared, PackedDecoder)
    assert prepared.head_words is not None
    h = jnp.asarray(np.random.default_rng(0).standard_normal((2, 160)), jnp.float32)
    one_by_one = np.concatenate([prepared.logits(h[i : i + 1]) for i in range(2)])
    np.testing.assert_allclose(one_by_one, prepared.logits(h), rtol=1e-5, atol=1e-4)
