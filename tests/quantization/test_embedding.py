"""Embedding and LM head as integers: the nearest ones, the same wherever they are read, and as small as they say."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twla_jax.core.tensors import IntegerTensor
from twla_jax.errors import TwlaError
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import Linear, shallow_copy
from twla_jax.quantization.embedding import quantize_embeddings
from twla_jax.recipe import EmbeddingSettings, Recipe
from twla_jax.storage import accounting, checkpoint

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9)).astype(np.int32)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tiny_ternary) -> Decoder:
    config = tiny_ternary.config
    tiny_ternary.config = dataclasses.replace(config, tie_word_embeddings=request.param)
    if not request.param:
        sizes = config.hidden_size, config.vocab_size
        head = Linear(*sizes, bias=False, leading=(), rngs=nnx.Rngs(1), dtype=jnp.float16)
        tiny_ternary.head = nnx.data(head)
    return tiny_ternary


def stored(model):
    """Embedding and head, a row a token."""
    found = [model.embed.get_value()]
    if model.head is not None:
        kernel = model.head.kernel.get_value()
        found.append(kernel if isinstance(kernel, IntegerTensor) else kernel.T)
    return found


def tables(model):
    """The same as floats."""
    floats = (t.dequantize() if isinstance(t, IntegerTensor) else t for t in stored(model))
    return [np.asarray(t, np.float64) for t in floats]


@pytest.mark.parametrize(("bits", "group"), [(8, 16), (4, 16), (4, 0), (3, 128)])
def test_every_value_is_the_nearest_of_its_groups(model, bits, group):
    original = tables(model)
    quantised = quantize_embeddings(model, EmbeddingSettings(bits=bits, group_size=group))
    for w, found, tensor in zip(original, tables(quantised), stored(quantised), strict=True):
        scale, zero = (
            np.repeat(np.asarray(p, np.float64), group or w.shape[1], axis=1)[:, : w.shape[1], None]
            for p in (tensor.scale, tensor.zero_point)
        )
        levels = scale * (np.arange(2**bits) - zero)
        np.testing.assert_allclose(np.abs(w - found), np.abs(w[..., None] - levels).min(-1), atol=1e-6)
    for before, after in zip(original, tables(model), strict=True):
        np.testing.assert_array_equal(before, after)


def test_more_bits_come_nearer(model):
    def error(bits):
        quantised = quantize_embeddings(model, EmbeddingSettings(bits=bits, group_size=16))
        return sum(np.square(a - b).sum() for a, b in zip(tables(model), tables(quantised), strict=True))

    errors = [error(bits) for bits in (2, 3, 4, 6, 8)]
    assert all(low < high / 3 for high, low in itertools.pairwise(errors))


def test_logits_are_those_of_the_same_floats(model):
    quantised = quantize_embeddings(model, EmbeddingSettings(bits=4, group_size=16))
    plain = shallow_copy(quantised)
    embed, *head = (jnp.asarray(t, jnp.float32) for t in tables(quantised))
    plain.embed = nnx.Param(embed)
    if head:
        plain.head.kernel = nnx.Param(head[0].T)
    expected = plain(TOKENS)
    np.testing.assert_allclose(quantised(TOKENS), expected, rtol=1e-6, atol=1e-6)


def test_a_model_prepared_for_inference_reads_them_too(tiny_config):
    for tied in (True, False):
        config = dataclasses.replace(tiny_config, tie_word_embeddings=tied)
        quantised = quantize_embeddings(
            Decoder(config, rngs=nnx.Rngs(0)), EmbeddingSettings(bits=4, group_size=16)
        )
        prepared = prepare_for_inference(jax.tree.map(jnp.asarray, quantised), unpack=False)
        np.testing.assert_allclose(prepared(TOKENS), quantised(TOKENS), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (3, 0), (8, 128), (8, 0)])
def test_a_model_prepared_for_inference_holds_packed_rows_and_no_floats(tiny_config, bits, group, tied):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=tied)
    recipe = EmbeddingSettings(bits=bits, group_size=group)
    quantised = quantize_embeddings(Decoder(config, rngs=nnx.Rngs(0)), recipe)
    prepared = prepare_for_inference(jax.tree.map(jnp.asarray, quantised), unpack=False)
    np.testing.assert_array_equal(prepared.embed_tokens(TOKENS), quantised.embed_tokens(TOKENS))
    outside = prepared.embed_tokens(jnp.array([[96, 97, -1, 2**31 - 1]]))
    np.testing.assert_array_equal(np.isnan(outside).all(-1), [[False, True, True, True]])
    np.testing.assert_allclose(prepared(TOKENS), quantised(TOKENS), atol=1e-5)
    # Rows and columns filled up to 128; a scale and a zero point of two bytes each for every 128 columns of a plane.
    planes, rows = 2 if bits <= 4 else 1, -(-config.vocab_size // 128) * 128
    tiles = -(-config.hidden_size // (128 * planes))
    for part in (prepared.embed, prepared.head):
        sizes = [leaf.nbytes for leaf in jax.tree.leaves(part)]
        assert sizes == ([] if part is None else [rows * tiles * 128, rows * tiles * planes * 4])


def test_a_folder_holds_it_at_its_bits(model, tmp_path):
    quantised = quantize_embeddings(model, EmbeddingSettings(bits=4, group_size=16))
    checkpoint.save(quantised, None, tmp_path / "out", Recipe(), {})
    loaded = checkpoint.load(tmp_path / "out")[0]
    np.testing.assert_array_equal(loaded(TOKENS), quantised(TOKENS))
    account = accounting.account(tmp_path / "out")
    tables_stored = 1 if model.head is None else 2
    # 97 rows of 42 codes at 4 bits, and 3 groups a row: a float16 scale and a zero point of 4 bits.
    assert account["breakdown"]["embeddings"] == tables_stored * 97 * (21 + 3 * 2 + 2)
    assert account["bytes_accounted"] == account["bytes_on_disk"]
    before = accounting_of(model, tmp_path / "before")
    assert account["weights"] == before["weights"]
    assert account["bits_per_weight_linear"] == before["bits_per_weight_linear"]
    assert account["linears"] == before["linears"]


def accounting_of(model, folder):
    checkpoint.save(model, None, folder, Recipe(), {})
    return accounting.account(folder)


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_other_bits_are_refused(bits):
    with pytest.raises(TwlaError, match=f"embedding.bits = {bits}: must be between 2 and 8"):
        EmbeddingSettings(bits=bits)
