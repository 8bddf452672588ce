"""Quantises small models with odd weights, family by family: `python benchmarks/check_odd_numbers.py [FAMILY …]`.

Matrices of zeros, of one value, of tiny values and with one huge weight; an input that is always zero; activations of
many thousands; experts that no token goes to; sinks that take all of the attention, or nothing. Each model has to be
quantised, to be the same after a way through its folder, and the same packed, all in finite numbers. Weights that
float16 cannot hold have to be refused by the block and the input that they are of, also of an expert without a token.
Then the model as it was has to be in bfloat16 near to what it is in float32, before and after quantising.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import twla_jax
from twla_jax.core.settings import (
    ActivationSettings,
    QuantizationSettings,
    RotationSettings,
    TernarySettings,
    WeightSettings,
)
from twla_jax.errors import TwlaError
from twla_jax.models.decoder import Decoder, computing_in
from twla_jax.models.families import config_from_hf
from twla_jax.models.layers import replace
from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint

SIZES = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {**SIZES, **EXPERTS, "sliding_window": 8},
    "qwen3_moe": {**SIZES, **EXPERTS, "norm_topk_prob": True},
    "mixtral": {**SIZES, **EXPERTS},
    "gemma2": {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 8},
}
SETTINGS = QuantizationSettings(
    weights=WeightSettings(quantizer=TernarySettings(euclidean_steps=3, rounds=1)),
    rotation=RotationSettings(steps=2),
    activations=ActivationSettings(bits=8, clips=(1.0, 0.8), clip_tokens=32),
)
WINDOWS = np.random.default_rng(0).integers(0, 95, (4, 16)).astype(np.int32)
DEAD = 2  # the expert that no token goes to
forward = jax.jit(lambda model, tokens: model(tokens))


def changed(model: Decoder, path: str, value: Any, at: Any = 0) -> Decoder:
    """Return the model with a value in all or some places of a parameter, by default in its first layer."""
    *parents, last = path.split(".")
    owner = model
    for each in parents:
        owner = getattr(owner, each)
    array = np.array(getattr(owner, last).get_value())
    array[at] = value
    return replace(model, {path: array})


def with_a_dead_expert(model: Decoder) -> Decoder:
    """Return the model with three experts that the router cannot tell apart: of two, the third is never chosen."""
    router, changes = model.blocks.router, {}
    for name in ("kernel", "bias"):
        if (held := getattr(router, name)) is not None:
            array = np.array(held.get_value())
            array[..., 1 : DEAD + 1] = array[..., :1]
            changes[f"blocks.router.{name}"] = array
    return replace(model, changes)


def odd_models(model: Decoder) -> dict[str, Decoder]:
    """Return models that have to be quantised, by what is odd about them."""
    made = {
        "a matrix of zeros": changed(model, "blocks.gate.kernel", 0),
        "a matrix of one value": changed(model, "blocks.q.kernel", 0.02),
        "a matrix of tiny values": changed(model, "blocks.up.kernel", 1e-7),
        "a huge weight": changed(model, "blocks.up.kernel", 6e4, (0, ..., 3, 5)),
        "an input that is always zero": changed(model, "blocks.post_norm.scale", 0),
        "activations of many thousands": changed(model, "embed", 3e4, (slice(None), 1)),
    }
    if model.config.num_experts:
        dead = with_a_dead_expert(model)
        made["an expert without a token"] = dead
        made["an expert without a token, of zeros"] = changed(dead, "blocks.gate.kernel", 0, (0, DEAD))
        made["an expert without a token, with a huge weight"] = changed(
            dead, "blocks.down.kernel", 6e4, (1, DEAD, 3, 5)
        )
    if hasattr(model.blocks, "sinks"):
        made["sinks that take all"] = changed(model, "blocks.sinks", 1e4)
        made["sinks that take nothing"] = changed(model, "blocks.sinks", -1e4)
    return made


def broken_models(model: Decoder) -> dict[str, tuple[Decoder, str]]:
    """Return models that have to be refused, with where the message says that it is."""
    made = {
        "a weight beyond float16": (
            changed(model, "blocks.down.kernel", 1e7, (1, ..., 3, 5)),
            "block 1, input down",
        ),
        "activations beyond float16": (
            computing_in(changed(model, "embed", 7e4, (slice(None), 1)), jnp.float16),
            "activations float16's",
        ),
        "a weight that is NaN": (changed(model, "blocks.o.kernel", np.nan, (1, 0, 0)), ""),
    }
    if model.config.num_experts:
        dead = with_a_dead_expert(model)
        made["a weight beyond float16 in an expert without a token"] = (
            changed(dead, "blocks.down.kernel", 1e7, (1, DEAD, 3, 5)),
            "block 1, input down",
        )
    return made


def check(model: Decoder, windows: np.ndarray, settings: QuantizationSettings) -> dict[str, Any]:
    """Return the figures of quantising a model, once all that comes of it is finite and the same in every form."""
    made, report = twla_jax.quantize_blocks(model, windows, settings, progress=False)
    errors = [site[name] for site in report["sites"] for name in ("output_error", "weight_error")]
    assert all(0 <= each < 4 for each in errors), errors
    finite([leaf for leaf in jax.tree.leaves(made) if np.issubdtype(leaf.dtype, np.floating)])
    with tempfile.TemporaryDirectory() as name:
        checkpoint.save(made, None, Path(name) / "out", Recipe(name="odd"), {})
        again = checkpoint.load(Path(name) / "out")[0]
        for saved, read in zip(jax.tree.leaves(made), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(saved, read)
    sixteen = twla_jax.set_activation_bits(made, bits=16)
    logits = np.asarray(forward(sixteen, windows))
    packed = np.asarray(forward(twla_jax.prepare_for_inference(sixteen, unpack=False), windows))
    finite([logits, packed])
    np.testing.assert_allclose(packed, logits, atol=1e-4 * np.abs(logits).max())
    return report


def finite(arrays: list[Any]) -> None:
    """Check that no array has NaN or infinity in it."""
    assert all(np.isfinite(np.asarray(each, np.float32)).all() for each in arrays)


def narrow_error(model: Decoder) -> float:
    """Return how far logits in bfloat16 are from those in float32, as a share of their size: the median token's.

    Where two experts are nearly as likely, a token may go to the other one, and its logits are others.
    """
    exact, near = (
        np.asarray(forward(computing_in(model, dtype), WINDOWS), np.float64)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    finite([exact, near])
    return float(np.median(np.abs(near - exact).mean(-1)) / np.abs(exact).mean())


def outcome(model: Decoder) -> str:
    """Return what came of quantising a model."""
    try:
        report = check(model, WINDOWS, SETTINGS)
    except TwlaError as error:
        return f"refused: {error}"
    except AssertionError as error:
        return f"WRONG: {' '.join(str(error).split())}"
    largest = max(site["output_error"] for site in report["sites"])
    unseen = any(site.get("fewest_tokens") == 0 for site in report["sites"])
    return f"quantised, error at most {largest:.2f}{', an expert saw no token' if unseen else ''}"


def main() -> None:
    """Print a row for every model."""
    wrong = 0
    for family in sys.argv[1:] or FAMILIES:
        config = config_from_hf({"model_type": family, **FAMILIES[family]})
        model = jax.tree.map(np.asarray, Decoder(config, rngs=nnx.Rngs(0)))
        rows = {name: outcome(each) for name, each in ({"nothing": model} | odd_models(model)).items()}
        for name, said in rows.items():
            rows[name] = said if said.startswith("quantised") else f"WRONG: {said}"
        for name, (each, place) in broken_models(model).items():
            said = outcome(each)
            rows[name] = said if said.startswith("refused") and place in said else f"WRONG: {said}"
        error = narrow_error(model)
        rows["nothing, in bfloat16"] = (
            f"{'' if error < 0.05 else 'WRONG: '}the median token's logits differ by {error:.1%}"
        )
        for name, said in rows.items():
            print(f"| {family} | {name} | {said} |", flush=True)
        wrong += sum("WRONG" in said for said in rows.values())
    print(f"{wrong} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
