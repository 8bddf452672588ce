"""Rotations that weights take up leave the model's function as it is, against the PyTorch models' logits in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core.settings import FoldedRotationSettings
from twla_jax.errors import TwlaError
from twla_jax.models.families import FAMILIES, config_from_hf
from twla_jax.models.folded_rotation import fold_rotation, folded_config
from twla_jax.models.io import huggingface
from twla_jax.models.stored_layers import StoredLayers

FOLDED = (
    *("llama_tied_llama3", "llama_linear_biases", "mistral_sliding", "qwen2_tied", "qwen3"),
    *("smollm3", "granite", "phi4_mini"),
)
REFUSED = ("gemma2", "gemma3", "olmo2", "olmo3", "mixtral", "qwen3_moe", "gpt_oss")
forward = jax.jit(lambda model, tokens: model(tokens))


def in_float32(model):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), model)


@pytest.mark.parametrize("name", FOLDED)
def test_the_models_function_stays_to_float32s_rounding(name, golden, tmp_path):
    case = golden(name)
    model = in_float32(huggingface.load_model(case.write(tmp_path)))
    folded = fold_rotation(model, FoldedRotationSettings())
    logits = np.asarray(forward(folded, case.tokens))
    assert np.abs(logits - case.logits).max() <= 1e-5 * np.abs(case.logits).max()
    for norm in (folded.norm, *(getattr(folded.blocks, name) for name in folded.blocks.norms)):
        assert (np.asarray(norm.scale.get_value()) == 1).all()
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        before, after = (getattr(each.blocks, name).kernel.get_value() for each in (model, folded))
        assert np.abs(after - before).max() > 0.1 * np.abs(before).max(), name


def test_every_family_is_rotated_or_refused_in_one_line(golden):
    folded, refused = ({golden(name).config["model_type"] for name in names} for names in (FOLDED, REFUSED))
    assert folded | refused == set(FAMILIES)
    for name in REFUSED:
        with pytest.raises(TwlaError, match=r"^folded_rotation: .*; leave the table out$"):
            folded_config(config_from_hf(golden(name).config))


def test_layers_in_files_are_rotated_when_they_are_read(golden, tmp_path):
    folder, settings = golden("llama_linear_biases").write(tmp_path), FoldedRotationSettings(seed=1)
    here, stored = (
        fold_rotation(huggingface.load_model(folder, in_files=in_files), settings)
        for in_files in (False, True)
    )
    for name in ("v", "o", "down"):
        kernel = getattr(stored.blocks, name).kernel.get_value()
        assert isinstance(kernel, StoredLayers)
        np.testing.assert_array_equal(kernel, getattr(here.blocks, name).kernel.get_value())


def test_values_may_stay_as_they_are(golden, tmp_path):
    model = in_float32(huggingface.load_model(golden("llama_tied_llama3").write(tmp_path)))
    pair = [fold_rotation(model, FoldedRotationSettings(value_heads=heads)) for heads in (False, True)]

    def kernels(name):
        return (getattr(each.blocks, name).kernel.get_value() for each in pair)

    for name in ("q", "k", "gate", "up", "down"):
        np.testing.assert_array_equal(*kernels(name))
    # Each head of v is only rotated: what an input makes of it keeps its length.
    alone, turned = (each.reshape(*each.shape[:2], -1, model.config.head_dim) for each in kernels("v"))
    assert np.abs(turned - alone).max() > 0.1 * np.abs(alone).max()
    np.testing.assert_allclose(*(np.linalg.norm(each, axis=-1) for each in (alone, turned)), rtol=1e-5)


def test_weights_that_their_type_cannot_hold_are_refused(golden, tmp_path):
    model = huggingface.load_model(golden("llama_tied_llama3").write(tmp_path))
    model.norm.scale.set_value(jnp.full_like(model.norm.scale.get_value(), 6e4))
    model.embed.set_value(100 * model.embed.get_value())
    with pytest.raises(TwlaError, match="exceeds the range of float16"):
        fold_rotation(model, FoldedRotationSettings())
