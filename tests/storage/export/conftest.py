"""A quantised folder with a tokenizer and generation settings, and what its packed tensors stand for."""

import json

import numpy as np
import pytest
import tokenizers
import transformers

from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint


@pytest.fixture
def word_tokenizer(tiny_config):
    """One token a word, with a chat template."""
    words = ["<s>", "</s>", *(f"w{i}" for i in range(tiny_config.vocab_size - 2))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<s>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


@pytest.fixture
def quantised_folder(tiny_ternary, word_tokenizer, tmp_path):
    """What `twla quantize` leaves, of random codes, rotations and clips."""
    folder = tmp_path / "out"
    generation = json.dumps({"eos_token_id": 1, "temperature": 0.6}).encode()
    checkpoint.save(
        tiny_ternary, word_tokenizer, folder, Recipe(), {}, extra={"generation_config.json": generation}
    )
    return folder


@pytest.fixture
def folded():
    """Independent of the library: weights in the original basis in float64, `Ŵ (L ⊗ Rᵀ)`."""

    def of(model, name, site, layer):
        tensor = getattr(model.blocks, name).kernel.get_value()
        rotation = getattr(model.blocks, f"{site}_input").rotation.get_value()
        left, right = (np.asarray(f[layer], np.float64) for f in (rotation.left, rotation.right))
        m, group = tensor.in_features, tensor.group_size
        # Planar 2-bit tiles: this model's rows are narrower than one tile, so a byte's four codes are a quarter apart.
        stored = np.asarray(tensor.codes[layer])
        codes = np.concatenate([stored >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)[:, :m] - 1.0
        alpha, mu = (
            np.repeat(np.asarray(p[layer], np.float64), group, 1)[:, :m] for p in (tensor.alpha, tensor.mu)
        )
        return (alpha * codes + mu) @ np.kron(left, right.T)

    return of
