"""A mixture of experts goes all the way: quantised, refined, saved, counted, packed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import twla_jax
from twla_jax.core import gptq, kotms
from twla_jax.core.settings import (
    ActivationSettings,
    CompensationSettings,
    GroupedSettings,
    QuantizationSettings,
    RotationSettings,
    TernarySettings,
    WeightSettings,
)
from twla_jax.core.tensors import TernaryTensor, dequantize
from twla_jax.errors import TwlaError
from twla_jax.jobs.export_model import export_model
from twla_jax.models import sharding, sites
from twla_jax.models.blocks import State, run
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.io import readers
from twla_jax.quantization.experts import ExpertMoments, quantize_experts
from twla_jax.recipe import CalibrationSettings, Recipe
from twla_jax.refinement import blockwise
from twla_jax.refinement_settings import BlockRefinementSettings
from twla_jax.storage import accounting, checkpoint, prediction
from twla_jax.storage.export import gguf_file

import check_odd_numbers as odd
from helpers.plain_planes import EXPERTS, plain_model

CONFIG = DecoderConfig(
    model_type="qwen3_moe",
    vocab_size=95,
    hidden_size=24,
    intermediate_size=16,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    qk_norm=True,
    num_experts=6,
    experts_per_token=2,
    normalize_routing=True,
)
SETTINGS = QuantizationSettings(
    weights=WeightSettings(quantizer=TernarySettings(euclidean_steps=3, rounds=1)),
    rotation=RotationSettings(steps=2),
    activations=ActivationSettings(bits=8, clips=(1.0, 0.8), clip_tokens=32),
)
RECIPE = Recipe(
    name="experts",
    weights=SETTINGS.weights,
    rotation=SETTINGS.rotation,
    activations=SETTINGS.activations,
    calibration=CalibrationSettings(windows=4, seq_len=16),
)
forward = jax.jit(lambda model, tokens: model(tokens))
WINDOWS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return jax.tree.map(np.asarray, Decoder(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def quantized(model):
    return twla_jax.quantize_blocks(model, WINDOWS, SETTINGS, progress=False)


@pytest.fixture(scope="module")
def loaded(quantized, tmp_path_factory):
    """The model after a way through its folder, the folder, and the model before."""
    folder = tmp_path_factory.mktemp("models") / "out"
    checkpoint.save(quantized[0], None, folder, RECIPE, {})
    return checkpoint.load(folder)[0], folder


def chosen_experts(model):
    """The experts of every token in the first layer of a model, `[tokens, k]`."""

    @jax.jit
    def route(model):
        block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
        context = model.context(WINDOWS.shape[1]).layer(0)
        state = run(block, State(model.embed_tokens(WINDOWS)), context, 0, 2)
        return block.route(state, context).experts

    return np.asarray(route(model)).reshape(-1, CONFIG.experts_per_token)


@pytest.mark.parametrize("rows_for_each", [False, True])
def test_moments_are_those_of_each_expert_s_tokens(rows_for_each):
    rng = np.random.default_rng(1)
    experts = np.stack([rng.permutation(5)[:2] for _ in range(3 * 15)]).reshape(3, 15, 2).astype(np.int32)
    real = np.array([1.0, 1.0, 0.0], np.float32)
    x = rng.normal(size=(3, 15, 2, 7) if rows_for_each else (3, 15, 7)).astype(np.float32)
    x *= real.reshape(-1, *[1] * (x.ndim - 1))
    left = rng.normal(size=x.shape).astype(np.float32)
    found = jax.jit(ExpertMoments.add)(ExpertMoments.zeros(5, 7), left, x, experts, real)
    for expert in range(5):
        there = np.argwhere((experts == expert) & (real[:, None, None] > 0))
        rows = [tuple(at) if rows_for_each else tuple(at[:2]) for at in there]
        expected = sum(np.outer(left[at], x[at]) for at in rows)
        np.testing.assert_allclose(found.sums[expert], expected, atol=1e-5)
        assert found.tokens[expert] == len(rows)


def test_one_sweep_quantises_every_expert_as_it_would_be_alone():
    rng = np.random.default_rng(2)
    m, counts = 12, np.array([40.0, 5.0, 30.0])
    inputs = [rng.normal(size=(int(count), m)).astype(np.float32) for count in counts]
    kernels = tuple(jnp.asarray(rng.normal(size=(3, m, n)), jnp.float32) for n in (8, 4))
    sums = jnp.stack([x.T @ x for x in inputs])
    moments = ExpertMoments(sums=sums, tokens=jnp.asarray(counts, jnp.float32))
    rotation = kotms.KroneckerRotation(
        *(jnp.asarray(np.linalg.qr(rng.normal(size=(n, n)))[0], jnp.float16) for n in (3, 4))
    )
    settings = dataclasses.replace(SETTINGS, rotation=None)
    tensors, clips, figures = quantize_experts(
        kernels, rotation, moments, jnp.asarray(np.concatenate(inputs)), settings=settings
    )
    factors = [factor.astype(jnp.float32) for factor in (rotation.left, rotation.right)]
    for expert in range(3):
        rows = jnp.concatenate([kernel[expert].T for kernel in kernels])
        # The second saw fewer tokens than there are features: the moments of all stand in for its own.
        used, tokens = (sums.sum(0), counts.sum()) if expert == 1 else (sums[expert], counts[expert])
        alone, _ = gptq.quantize_matrix(
            kotms.rotate(rows, *factors),
            kotms.rotate_moment(used, rotation),
            tokens,
            settings=settings.weights,
        )
        for part in ("codes", "alpha", "mu"):
            together = np.concatenate([getattr(tensor, part)[expert] for tensor in tensors])
            np.testing.assert_array_equal(together, getattr(alone, part), err_msg=part)
    assert clips.shape == (4,)
    np.testing.assert_array_equal(figures["tokens"], counts)
    assert 0 < figures["output_error"] < 1


def test_the_report_names_experts_that_saw_too_few_tokens(model, quantized):
    _, report = quantized
    first = {site["site"]: site for site in report["sites"] if site["layer"] == 0}
    assert "pooled_experts" not in first["qkv"]
    # Of the first layer's router, only rounding by the quantised attention before it comes between the two.
    student = jax.tree.map(jnp.asarray, quantized[0])
    counts = np.bincount(chosen_experts(student).reshape(-1), minlength=CONFIG.num_experts)
    for name, features in (("mlp", 24), ("down", 16)):
        assert first[name]["fewest_tokens"] == counts.min()
        assert first[name]["pooled_experts"] == np.flatnonzero(counts < features).tolist()


def test_experts_without_a_token_are_quantised_and_counted_whatever_their_weights(model):
    """All three ties go to the lower experts; what is stored is finite, read back and packed the same."""
    kinds = {name: each for name, each in odd.odd_models(model).items() if "an expert" in name}
    assert len(kinds) == 3
    for each in kinds.values():
        sites = odd.check(each, odd.WINDOWS, SETTINGS)["sites"]
        experts = [site for site in sites if "pooled_experts" in site]
        assert [site["site"] for site in experts] == ["mlp", "down"] * 2
        for site in experts:
            assert site["fewest_tokens"] == 0
            assert odd.DEAD in site["pooled_experts"]


def test_weights_beyond_float16_are_refused_even_of_an_expert_without_a_token(model):
    kinds = {name: each for name, each in odd.broken_models(model).items() if "an expert" in name}
    ((broken, place),) = kinds.values()
    with pytest.raises(TwlaError, match=f"^{place}: .* float16"):
        twla_jax.quantize_blocks(broken, WINDOWS, SETTINGS, progress=False)


def test_experts_are_stacked_leaves_and_the_router_stays(model, quantized):
    blocks = quantized[0].blocks
    for name, rows in (("gate", 16), ("up", 16), ("down", 24)):
        kernel = getattr(blocks, name).kernel.get_value()
        assert isinstance(kernel, TernaryTensor)
        assert kernel.shape[:3] == (2, 6, rows)
    np.testing.assert_array_equal(blocks.router.kernel.get_value(), model.blocks.router.kernel.get_value())
    assert blocks.mlp_input.rotation.get_value().left.shape[:1] == (2,)  # of a layer, not of an expert


def test_a_folder_gives_it_back_and_counts_what_a_token_activates(quantized, loaded):
    again, folder = loaded
    for saved, read in zip(jax.tree.leaves(quantized[0]), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(saved, read)
    account = accounting.account(folder)
    experts = 2 * 6 * 3 * 24 * 16
    assert account["quantized_weights"] == experts + 2 * (24 * (24 + 8 + 8) + 24 * 24)
    assert account["activated_weights"] == account["weights"] - experts * 4 // 6 - 94 * 24
    stored = sum(account["breakdown"][kind] for kind in ("codes", "scales_and_offsets"))
    assert account["activated_bytes"] < account["bytes_accounted"] - stored * 0.4
    assert "a token activates" in accounting.format_account(account)
    predicted = prediction.predict(CONFIG, RECIPE)
    assert predicted["quantized_weights"] == account["quantized_weights"]
    assert predicted["weights"] == account["weights"]
    assert predicted["bits_per_weight_linear"] == pytest.approx(account["bits_per_weight_linear"])


def test_bits_count_for_the_experts_that_a_token_goes_to(quantized):
    elements = sites.site_weights(quantized[0], "input", "elements")[:4]
    macs = sites.site_weights(quantized[0], "input", "macs")[:4]
    np.testing.assert_array_equal(elements, [24, 24, 24, 2 * 16])
    np.testing.assert_array_equal(macs, [24 * 40, 24 * 24, 2 * 24 * 32, 2 * 16 * 24])


@pytest.mark.slow
def test_refinement_moves_it_towards_its_teacher(model, quantized):
    settings = BlockRefinementSettings(steps=8, batch=4, mix=0.0, dtype="float32", rotation_rate=1e-3)
    refined, figures = blockwise.refine_blocks(quantized[0], model, WINDOWS, settings, progress=False)
    assert all(after < before for before, after in figures["loss"])
    before, after = (each.blocks.gate.kernel.get_value() for each in (quantized[0], refined))
    assert (np.asarray(before.alpha) != np.asarray(after.alpha)).any((-1, -2)).all()  # of every expert
    assert before.shape == after.shape


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["data=2", "model=2"])
def test_on_a_mesh_it_is_quantised_and_scored_as_on_one_device(model, quantized, axes):
    """A sum in another order may tip a code, and that a token's expert: the errors stay what they are."""
    mesh = sharding.make_mesh(axes)
    split, figures = twla_jax.quantize_blocks(model, WINDOWS, SETTINGS, mesh=mesh, progress=False)
    for here, one in zip(figures["sites"], quantized[1]["sites"], strict=True):
        assert here["output_error"] == pytest.approx(one["output_error"], rel=0.1)
        if here["layer"] == 0:  # nothing has been quantised before its router but attention
            assert here.get("fewest_tokens") == one.get("fewest_tokens")
    sixteen, other = (twla_jax.set_activation_bits(each, bits=16) for each in (quantized[0], split))
    scored = functools.partial(twla_jax.evaluate, tokens=WINDOWS, progress=False)
    alone = scored(sixteen)["nll"]
    assert scored(sixteen, mesh=mesh)["nll"] == pytest.approx(alone, rel=1e-5)
    assert scored(other, mesh=mesh)["nll"] == pytest.approx(alone, rel=0.01)
    with pytest.raises(TwlaError, match="experts cannot be spread over a mesh"):
        twla_jax.prepare_for_inference(sixteen, mesh=mesh, unpack=False)
    tokens = [
        twla_jax.generate(each, WINDOWS[:2, :8], max_new_tokens=4, eos_token_ids=())
        for each in (sixteen, sharding.place(sixteen, mesh))
    ]
    np.testing.assert_array_equal(*tokens)


def test_packed_it_computes_and_generates_the_same(loaded):
    sixteen = twla_jax.set_activation_bits(loaded[0], bits=16)
    packed = twla_jax.prepare_for_inference(sixteen, unpack=False)
    logits = [forward(each, WINDOWS) for each in (sixteen, packed)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    # With a cache, and a few tokens at a time, it continues the text as the whole of it says.
    found = twla_jax.generate(packed, WINDOWS[:, :15], max_new_tokens=1, eos_token_ids=())
    np.testing.assert_array_equal(np.asarray(found)[:, -1], np.asarray(logits[0])[:, 14].argmax(-1))


def test_the_published_layout_is_refused(model):
    published = WeightSettings(quantizer=GroupedSettings(), compensation=CompensationSettings(propagation=0))
    settings = dataclasses.replace(SETTINGS, weights=published)
    with pytest.raises(TwlaError, match="published layout has no form for experts"):
        twla_jax.quantize_blocks(model, WINDOWS, settings, progress=False)


@pytest.mark.parametrize(("format", "options"), [("hf", {"dtype": "float32"}), ("gguf", {})])
def test_exported_it_scores_as_the_quantised_model_with_16_bit_activations(loaded, tmp_path, format, options):
    export_model(loaded[1], tmp_path / "dest", format=format, **options)
    again = jax.tree.map(jnp.asarray, readers.load_model(tmp_path / "dest"))
    sixteen = twla_jax.set_activation_bits(loaded[0], bits=16)
    expected, found = (np.asarray(forward(each, WINDOWS)) for each in (sixteen, again))
    tolerance = 1e-4 if format == "hf" else 0.02  # float16 rounds the folded weights
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("format", ["compressed-tensors", "hqq"])
def test_formats_without_a_form_for_experts_refuse_it(loaded, tmp_path, format):
    with pytest.raises(
        TwlaError, match=f"^{format} is not written for mixtures of experts; give --format hf"
    ):
        export_model(loaded[1], tmp_path / "dest", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_llama_cpps_ternary_type_holds_every_expert_exactly(family, tmp_path):
    config = dataclasses.replace(EXPERTS, model_type=family, qk_norm=family == "qwen3_moe")
    planes = plain_model(64, config=config)
    gguf_file.write(planes, None, tmp_path / "model.gguf", kind="q2_0")
    again = readers.load_model(tmp_path / "model.gguf").blocks
    for name in ("q", "gate", "up", "down"):
        expected = np.asarray(dequantize(getattr(planes.blocks, name).kernel.get_value()))
        np.testing.assert_array_equal(getattr(again, name).kernel.get_value(), expected.swapaxes(-1, -2))
    router = np.asarray(planes.blocks.router.kernel.get_value())
    np.testing.assert_array_equal(again.router.kernel.get_value(), router)
