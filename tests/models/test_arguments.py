"""Public functions refuse what they would compute something else from, in one line, before they begin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import twla_jax
from twla_jax.errors import TwlaError
from twla_jax.models.arguments import checked_tokens, require_pair
from twla_jax.models.decoder import Decoder
from twla_jax.recipe import Recipe
from twla_jax.refinement.blockwise import refine_blocks
from twla_jax.refinement.clip_training import train_clips
from twla_jax.refinement_settings import EndToEndSettings

IDS = np.arange(8).reshape(2, 4)
WRONG_TOKENS = [
    ("text", "is text, not token ids"),
    (IDS + 0.7, "whole numbers, not float"),
    (IDS > 2, "whole numbers, not bool"),
    (IDS + 2**32, "token id 4294967296 is not in"),
    (IDS + 90, "token id 97 is not in"),
    (IDS - 1, "token id -1 is not in"),
    (IDS[:0], "no token at all"),
    (IDS[None], "axes are wanted"),
    ([[1, 2], [3]], "one length"),
    (np.zeros((1, 4096), int), "exceeds the model's 2048 positions"),
]


@pytest.fixture(scope="module")
def model(tiny_config):
    return Decoder(tiny_config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("index", range(len(WRONG_TOKENS)))
@pytest.mark.parametrize("function", ["evaluate", "quantize", "refine"])
def test_tokens_are_ids_of_the_vocabulary(model, function, index):
    tokens, message = WRONG_TOKENS[index]
    calls = {
        "evaluate": lambda: twla_jax.evaluate(model, tokens, seq_len=4),
        "quantize": lambda: twla_jax.quantize(model, tokens, Recipe()),
        "refine": lambda: twla_jax.refine(model, model, tokens, EndToEndSettings(steps=1)),
    }
    with pytest.raises(TwlaError, match=message):
        calls[function]()


@pytest.mark.parametrize(
    "index", [i for i in range(len(WRONG_TOKENS)) if "positions" not in WRONG_TOKENS[i][1]]
)
def test_a_model_that_is_called_itself_takes_ids_of_its_vocabulary(model, index):
    tokens, message = WRONG_TOKENS[index]
    for call in (model, model.hidden, lambda ids: model.decode(ids, model.init_cache(2, 8))):
        with pytest.raises(TwlaError, match=message):
            call(tokens)


def test_a_model_takes_ids_on_the_host_on_the_device_as_lists_and_traced(model):
    logits = np.asarray(jax.jit(lambda ids: model(ids))(jnp.asarray(IDS)))
    for tokens in (IDS.tolist(), IDS.astype(np.uint16), jnp.asarray(IDS)):
        np.testing.assert_allclose(model(tokens), logits, rtol=1e-5, atol=1e-6)


def test_traced_ids_outside_the_vocabulary_are_no_other_token(model):
    """Nothing can be refused inside `jit`: what follows is NaN, and other rows are as they were."""
    wrong = np.concatenate([IDS, IDS[:1]])
    wrong[0, 2], wrong[1, 1] = 97, -1
    logits = np.asarray(jax.jit(lambda ids: model(ids))(jnp.asarray(wrong)))
    assert np.isnan(logits[0, 2:]).all()
    assert np.isnan(logits[1, 1:]).all()
    np.testing.assert_allclose(logits[2], model(IDS)[0], rtol=1e-5, atol=1e-6)


def test_ids_of_any_whole_type_come_as_int32(tiny_config):
    for dtype in (np.uint8, np.int64, np.uint64):
        tokens = checked_tokens(IDS.astype(dtype), tiny_config, "tokens")
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, IDS)


@pytest.mark.parametrize(
    "setting",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"max_windows": -1},
        {"max_windows": 0},
        {"chunk": 0},
        {"seq_len": 1},
        {"seq_len": 4.0},
        {"batch_size": True},
    ],
)
def test_no_figure_is_made_from_nothing(model, setting):
    with pytest.raises(TwlaError, match=next(iter(setting))):
        twla_jax.evaluate(model, IDS.ravel(), **{"seq_len": 4, **setting})


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("Once", {}, "prompt: is text, not token ids; take tokenizer"),
        (IDS[0], {}, "axes are wanted"),
        (IDS, {"max_new_tokens": 2.5}, "max_new_tokens 2.5: must be a whole number"),
        (IDS, {"max_new_tokens": 0}, "max_new_tokens 0"),
        (IDS, {"temperature": float("nan")}, "temperature nan"),
        (IDS, {"temperature": "hot"}, "temperature 'hot'"),
        (IDS, {"eos_token_ids": ["</s>"]}, "must be token ids"),
    ],
)
def test_generation_refuses_what_it_would_bend(model, prompt, settings, message):
    with pytest.raises(TwlaError, match=message):
        twla_jax.generate(model, prompt, **{"max_new_tokens": 1, **settings})


@pytest.mark.parametrize("bits", [0, 1, 3, 5, -3, 32, 4.0, "4", True])
def test_activations_have_bits_of_the_menu(tiny_ternary, bits):
    with pytest.raises(TwlaError, match="must be one of 16, 8, 6, 4, 2"):
        twla_jax.set_activation_bits(tiny_ternary, bits)


def test_models_and_settings_are_such(model, tiny_ternary, tiny_config):
    for call, message in (
        (lambda: twla_jax.quantize(model, IDS, "w1.58-g128"), "recipe: is a str, not a Recipe; load_recipe"),
        (lambda: twla_jax.quantize(tiny_ternary, IDS, Recipe()), "is quantised already"),
        (lambda: twla_jax.quantize("smollm2", IDS, Recipe()), "model: is a str, not a model; load"),
        (lambda: twla_jax.evaluate((model, None), IDS), "take the first of the pair"),
        (lambda: twla_jax.refine(model, None, IDS, EndToEndSettings(steps=1)), "teacher: is a NoneType"),
        (lambda: twla_jax.refine(model, model, IDS, Recipe()), "settings: is a Recipe"),
        (lambda: refine_blocks(model, model, IDS, Recipe()), "settings: is a Recipe"),
        (lambda: train_clips(model, model, IDS, Recipe()), "settings: is a Recipe"),
        (lambda: twla_jax.sample_text(model, 0, 4), "rows 0: must be"),
        (lambda: twla_jax.sample_text(model, 1, 4, seed=-1), "seed -1: must be"),
    ):
        with pytest.raises(TwlaError, match=message):
            call()


def test_a_model_learns_from_one_of_its_own_sizes(model, tiny_config):
    import dataclasses

    other = Decoder(dataclasses.replace(tiny_config, num_layers=1), rngs=nnx.Rngs(0))
    with pytest.raises(
        TwlaError, match="teacher: is another model than the student; their num_layers is 1 and 3"
    ):
        require_pair(model, other)
