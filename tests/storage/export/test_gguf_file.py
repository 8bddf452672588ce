"""The dequantised GGUF file, read by this library's reader and by the gguf package."""

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx

from twla_jax.errors import TwlaError
from twla_jax.jobs import export_model as job
from twla_jax.models.config import RopeScaling
from twla_jax.models.decoder import Decoder
from twla_jax.models.io import readers
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.models.io.pre_tokenizers import PRE_TOKENIZERS
from twla_jax.models.layers import replace
from twla_jax.models.rope import inverse_frequencies
from twla_jax.models.sites import set_activation_bits
from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint
from twla_jax.storage.export import gguf_file, gguf_vocabulary


def byte_level_tokenizer(pre: str = "llama-bpe", size: int = 97):
    """Byte-level BPE as published files have it, of so few tokens that only some bytes are known."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "</s>", *alphabet[: size - 8]])}
    vocabulary |= {piece: len(vocabulary) + i for i, piece in enumerate(["he", "ll", "hell"])}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("h", "e"), ("l", "l"), ("he", "ll")], ignore_merges=True)
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
            for pattern in PRE_TOKENIZERS[pre].patterns
        ]
        + [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{{ messages[0].content }}"
    return tokenizer


@pytest.fixture
def exported(tiny_ternary, tmp_path):
    checkpoint.save(tiny_ternary, byte_level_tokenizer(), tmp_path / "out", Recipe(), {})
    job.export_model(tmp_path / "out", tmp_path / "model.gguf", format="gguf")
    return tmp_path / "model.gguf"


def test_it_scores_as_the_quantised_model_with_16_bit_activations(exported, tiny_ternary):
    model, tokenizer = readers.read_model(exported)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 97, (2, 12)))
    expected = set_activation_bits(tiny_ternary, 16)(tokens)
    np.testing.assert_allclose(model(tokens), expected, atol=0.01 * float(jnp.abs(expected).max()))
    assert model.config.eos_token_ids == (1,)
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_the_gguf_package_reads_weights_of_the_original_basis(exported, tiny_ternary, folded):
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(exported).tensors}
    for name, key, site in (("attn_q", "q", "qkv"), ("ffn_down", "down", "down")):
        written = gguf.dequantize(held[f"blk.2.{name}.weight"].data, held[f"blk.2.{name}.weight"].tensor_type)
        expected = folded(tiny_ternary, key, site, 2)
        if (
            key == "q"
        ):  # llama.cpp turns neighbouring pairs: row 2i of a head is row i here, row 2i + 1 is row i + 7
            order = np.arange(14).reshape(2, 7).T.ravel()
            expected = expected.reshape(3, 14, 42)[:, order].reshape(42, 42)
        np.testing.assert_allclose(written, expected, atol=6e-4 * np.abs(expected).max())
    assert held["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="linear", factor=4.0),
        RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64),
        RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.2),
    ],
    ids=lambda scaling: scaling.kind,
)
def test_rotary_scalings_are_read_back(scaling, tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, rope_scaling=scaling, rope_theta=1000.0)
    gguf_file.write(Decoder(config, rngs=nnx.Rngs(0)), None, tmp_path / "model.gguf")
    held = readers.read_config(tmp_path / "model.gguf")
    np.testing.assert_allclose(inverse_frequencies(held), inverse_frequencies(config), rtol=1e-5)
    assert held.rope_scaling.attention_factor == pytest.approx(scaling.attention_factor)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm", "gpt-2"])
def test_a_byte_level_vocabulary_splits_text_as_before(pre, tmp_path):
    tokenizer = byte_level_tokenizer(pre, size=300)
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    tokenizer.backend_tokenizer.model.ignore_merges = PRE_TOKENIZERS[pre].ignores_merges
    gguf_vocabulary.add_vocabulary(writer, tokenizer, 310, (1, 7, 9))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    file = GgufFile(tmp_path / "v.gguf")
    gguf_vocabulary.check_vocabulary(file, tokenizer)
    assert PRE_TOKENIZERS[file.get("tokenizer.ggml.pre")].patterns == PRE_TOKENIZERS[pre].patterns
    assert file.get("tokenizer.ggml.tokens")[-1] == "[PAD309]"
    assert [file.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")] == [1, 7, 9]


def test_sentencepiece_vocabularies_keep_the_order_of_their_merges(tmp_path):
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *"▁abcdehlorw",
        "he",
        "ll",
        "▁he",
    ]
    merges = [("l", "l"), ("h", "e"), ("▁", "he")]
    model = tokenizers.models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    gguf_vocabulary.add_vocabulary(writer, tokenizer, len(pieces), (2,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    file = GgufFile(tmp_path / "v.gguf")
    gguf_vocabulary.check_vocabulary(file, tokenizer)
    scores = dict(zip(file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.scores"), strict=True))
    assert scores["ll"] > scores["he"] > scores["▁he"] > scores["h"]


def test_end_tokens_that_have_no_place_are_named(tiny_ternary, tmp_path, caplog):
    config = dataclasses.replace(tiny_ternary.config, eos_token_ids=(1, 5, 7, 9, 11))
    model = replace(tiny_ternary, config=config)
    gguf_file.write(model, byte_level_tokenizer(), tmp_path / "a.gguf", kind="f16")
    assert "places for 3 end tokens; left out: 9, 11" in caplog.text
    assert readers.read_config(tmp_path / "a.gguf").eos_token_ids == (1, 5, 7)


def test_what_llama_cpp_has_no_form_for_is_refused(quantised_folder, tiny_config, tmp_path):
    with pytest.raises(TwlaError, match="WordLevel, not BPE"):
        job.export_model(quantised_folder, tmp_path / "model.gguf", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    config = dataclasses.replace(tiny_config, sliding_window=9, sliding_layers=(1,))
    with pytest.raises(TwlaError, match="only some layers"):
        gguf_file.write(Decoder(config, rngs=nnx.Rngs(0)), None, tmp_path / "model.gguf")
