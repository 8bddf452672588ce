"""A family of its own wiring and names goes all the way, and no call changes the model that it is given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import twla_jax
from twla_jax.core.settings import ActivationSettings, RotationSettings, TernarySettings, WeightSettings
from twla_jax.core.tensors import TernaryTensor
from twla_jax.inference.execution import for_inference
from twla_jax.inference.packed_block import PackedBlock
from twla_jax.models import sites
from twla_jax.models.decoder import Decoder, computing_in
from twla_jax.models.families import FAMILIES
from twla_jax.quantization.embedding import quantize_embeddings
from twla_jax.recipe import AllocationSettings, CalibrationSettings, EmbeddingSettings, Recipe
from twla_jax.refinement import blockwise, clip_training
from twla_jax.refinement_settings import BlockRefinementSettings, ClipTrainingSettings, EndToEndSettings
from twla_jax.storage import checkpoint
from twla_jax.text.corpora import Corpus

from helpers.another_family import CONFIG, FAMILY, written_out
from helpers.clips import with_clips

RECIPE = Recipe(
    name="another",
    weights=WeightSettings(quantizer=TernarySettings(euclidean_steps=3, rounds=1)),
    rotation=RotationSettings(steps=2),
    activations=ActivationSettings(bits=8, clips=(1.0, 0.8), clip_tokens=32),
    embedding=EmbeddingSettings(bits=8, group_size=0),
    calibration=CalibrationSettings(windows=4, seq_len=16),
    allocation=AllocationSettings(budget=6.0, choices=(4, 8), windows=2),
)
LEARNING = {"steps": 2, "batch": 2, "dtype": "float32"}
WINDOWS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 16)).astype(np.int32)


class Letters:
    """A tokenizer whose ids are code points, less those before the space."""

    def __call__(self, text, verbose):
        return {"input_ids": [ord(letter) - 32 for letter in text]}


def text():
    letters = np.random.default_rng(1).integers(32, 127, 1000)
    return Corpus(name="letters", split="calibration", text="".join(map(chr, letters)), source="here")


class Watched:
    """Calls functions, and asserts after each that the models it was given are what they were."""

    def __init__(self):
        self.calls = 0

    def __call__(self, function, *models, **options):
        before = [self._seen(model) for model in models if isinstance(model, Decoder)]
        result = function(*models, **options)
        after = [self._seen(model) for model in models if isinstance(model, Decoder)]
        for (structure, leaves, copies), (other, others, _) in zip(before, after, strict=True):
            assert structure == other, function  # the attributes of every module are in it
            for leaf, same, copy in zip(leaves, others, copies, strict=True):
                assert leaf is same, function
                assert same.dtype == copy.dtype, function
                np.testing.assert_array_equal(same, copy)
        self.calls += len(before)
        return result

    @staticmethod
    def _seen(model):
        leaves, structure = jax.tree.flatten(model)
        return structure, leaves, [np.array(leaf) for leaf in leaves]


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The family under its name, as long as these tests run."""
    FAMILIES["another"] = FAMILY
    yield
    del FAMILIES["another"]


@pytest.fixture(scope="module")
def model(registered):
    """Random weights, biases and norms."""
    rng = np.random.default_rng(2)
    made = Decoder(CONFIG, rngs=nnx.Rngs(0))

    def noisy(path, leaf):
        name = str(path[-2] if len(path) > 1 else path)
        noise = rng.normal(size=leaf.shape) * 0.2
        return np.asarray(leaf + noise if "bias" in name or "scale" in name else leaf, np.float32)

    return jax.tree_util.tree_map_with_path(noisy, made)


@pytest.fixture(scope="module")
def stages(model, tmp_path_factory):
    """The model after every stage, each called on a model that must stay as it is."""
    call, quiet = Watched(), {"progress": False}
    linears, _ = call(twla_jax.quantize_blocks, model, WINDOWS, RECIPE.quantization, **quiet)
    found = {"quantised": call(quantize_embeddings, linears, RECIPE.embedding)}
    blocks = BlockRefinementSettings(rotation_rate=1e-3, **LEARNING)
    found["blocks"], _ = call(blockwise.refine_blocks, found["quantised"], model, WINDOWS, blocks, **quiet)
    end_to_end = EndToEndSettings(**{**LEARNING, "steps": 1})
    refined, figures = call(twla_jax.refine, found["blocks"], model, WINDOWS, end_to_end, **quiet)
    found["refined"], found["figures"] = refined, figures
    # From clips that cut off too much, in this model of random weights too, wider ones are learned.
    found["narrow"] = with_clips(refined, 0.3)
    clips = ClipTrainingSettings(bits=8, rate=5e-2, **LEARNING)
    found["clips"], _ = call(clip_training.train_clips, found["narrow"], model, WINDOWS, clips, **quiet)
    found["allocated"], found["bits"], _ = call(
        twla_jax.allocate_bits, found["clips"], text(), RECIPE, tokenizer=Letters(), **quiet
    )
    found["score"] = call(twla_jax.evaluate, found["allocated"], WINDOWS, **quiet)
    folder = tmp_path_factory.mktemp("models") / "out"
    call(checkpoint.save, found["allocated"], None, folder, RECIPE, {})
    found["loaded"], _, _ = checkpoint.load(folder)
    sixteen = call(twla_jax.set_activation_bits, found["loaded"], bits=16)
    found["sixteen"], found["packed"] = sixteen, call(twla_jax.prepare_for_inference, sixteen, unpack=False)
    call(for_inference, found["loaded"], "off", dtype="bfloat16")
    call(for_inference, found["loaded"], "on", dtype="bfloat16")
    call(computing_in, found["loaded"], "float16")
    call(twla_jax.generate, found["loaded"], WINDOWS[:1, :4], max_new_tokens=2)
    found["calls"] = call.calls
    return found


def test_the_forward_pass_is_that_written_out(model):
    found = jax.jit(lambda model, tokens: model.hidden(tokens))(model, WINDOWS[:1])[0]
    np.testing.assert_allclose(found, written_out(model, WINDOWS[0]), atol=2e-5)


def test_every_stage_changes_what_it_is_for_and_no_call_its_argument(model, stages):
    assert stages["calls"] == 17
    for site in model.sites:
        assert all(
            isinstance(each.kernel.get_value(), TernaryTensor)
            for each in stages["quantised"].blocks.linears(site)
        )
        assert stages["quantised"].blocks.transform(site).rotation is not None
    for before, after in (("quantised", "refined"), ("narrow", "clips"), ("clips", "allocated")):
        pairs = zip(jax.tree.leaves(stages[before]), jax.tree.leaves(stages[after]), strict=True)
        assert any((np.asarray(one) != np.asarray(other)).any() for one, other in pairs), after
    assert stages["figures"]["kept"]
    for name in model.blocks.norms:  # the norms after the sublayers learn, too
        scales = (getattr(stages[stage].blocks, name).scale.get_value() for stage in ("quantised", "refined"))
        assert np.abs(np.subtract(*scales)).max() > 0
    bits = sites.input_bits(stages["allocated"])
    assert list(stages["bits"]["bits"]) == ["tokens", "heads", "wide", "narrow"]
    np.testing.assert_array_equal(bits, np.stack(list(stages["bits"]["bits"].values()), axis=-1))
    assert np.isfinite(stages["score"]["nll"])


def test_a_folder_gives_the_model_back(stages):
    pairs = zip(jax.tree.leaves(stages["allocated"]), jax.tree.leaves(stages["loaded"]), strict=True)
    for saved, loaded in pairs:
        np.testing.assert_array_equal(saved, loaded)
    assert stages["loaded"].config == CONFIG


def test_packed_it_computes_and_generates_the_same(stages):
    model, packed = stages["sixteen"], stages["packed"]
    assert all(isinstance(block, PackedBlock) for block in packed.layers)
    logits = [jax.jit(lambda model, tokens: model(tokens))(each, WINDOWS) for each in (model, packed)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    found = twla_jax.generate(packed, WINDOWS[:2, :5], max_new_tokens=4, eos_token_ids=())
    expected = twla_jax.generate(model, WINDOWS[:2, :5], max_new_tokens=4, eos_token_ids=())
    np.testing.assert_array_equal(found, expected)


def test_other_dtypes_are_a_copy_s(model):
    narrow = computing_in(model, "bfloat16")
    assert (narrow.dtype, model.dtype) == (jnp.bfloat16, jnp.float32)
    assert all(
        one is other for one, other in zip(jax.tree.leaves(narrow), jax.tree.leaves(model), strict=True)
    )
    assert dataclasses.replace(CONFIG) == narrow.config
