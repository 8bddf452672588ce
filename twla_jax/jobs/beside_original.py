"""Sets a quantised model beside its original: weights and inputs before and after rotation, and what both write."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from twla_jax.core import kotms
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.errors import TwlaError
from twla_jax.jobs import continuations
from twla_jax.models.decoder import Decoder
from twla_jax.quantization import pipeline
from twla_jax.text import corpora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 512  # of the first linear of a site, whose weights are counted
_WINDOWS = 2  # of text, whose tokens' inputs are looked at
_LENGTH = 256
_BINS = 61


def beside_original(
    quantized: Decoder, original: Decoder, tokenizer: "PreTrainedTokenizerBase", *, prompt: str, corpus: str
) -> dict[str, Any]:
    """Return what a report shows of a model and its original, JSON-ready.

    Args:
      quantized: with the rotations that are applied.
      original: in full precision.
      tokenizer: of both.
      prompt: text that both continue.
      corpus: whose evaluation text the inputs are taken from.
    Returns:
      `edges`, and `weights` by site: densities `before` and `after` rotation over these bins, and their `layer`;
      `peaks` by site: `before` and `after` for each layer; `prompt` and `samples` by who wrote them.
    Raises:
      TwlaError: the two models have other shapes.
    """
    if quantized.config.to_dict() != original.config.to_dict():
        raise TwlaError("--against: is of another shape; give the model that was quantised")
    rotations = _rotations(quantized)
    edges = np.linspace(-3, 3, _BINS + 1)
    middle = original.config.num_layers // 2
    weights = {
        name: {"layer": middle, **_histograms(quantized, original, name, rotation, middle, edges)}
        for name, rotation in rotations.items()
    }
    peaks = _peaks(original, tokenizer, rotations, corpus) if rotations else {}
    rows = continuations.continue_prompt({"original": original, "quantised": quantized}, tokenizer, prompt)
    how = {0.0: "the likeliest tokens"}
    samples = {
        f"{row['model']}, {how.get(row['temperature'], f'temperature {row["temperature"]:g}')}": row["text"]
        for row in rows
    }
    return {
        "edges": edges.tolist(),
        "weights": weights,
        "peaks": peaks,
        "prompt": prompt,
        "samples": samples,
    }


def _rotations(model: Decoder) -> dict[str, KroneckerRotation]:
    """Return the rotations of the sites that have one, of all layers."""
    held = {site.name: model.blocks.transform(site).rotation for site in model.sites}
    return {name: value.get_value() for name, value in held.items() if value is not None}


def _histograms(
    quantized: Decoder,
    original: Decoder,
    name: str,
    rotation: KroneckerRotation,
    layer: int,
    edges: np.ndarray,
) -> dict[str, list[float]]:
    site = next(site for site in original.sites if site.name == name)
    linear = site.linears[0]
    kernel = np.asarray(getattr(original.blocks, linear).kernel.get_value()[layer], np.float32)
    rows = np.swapaxes(kernel, -1, -2).reshape(-1, kernel.shape[-2])[:_ROWS]
    left, right = (jnp.asarray(each[layer], jnp.float32) for each in (rotation.left, rotation.right))
    turned = np.asarray(kotms.rotate(jnp.asarray(rows), left, right))
    tensor = getattr(quantized.blocks, linear).kernel.get_value()
    group = min(getattr(tensor, "group_size", rows.shape[1]), rows.shape[1])
    return {key: density(each, group, edges) for key, each in (("before", rows), ("after", turned))}


def density(rows: Float[np.ndarray, "n m"], group: int, edges: Float[np.ndarray, " bins"]) -> list[float]:
    """Return the density, in bins, of weights over the root mean square of their group of columns."""
    cut = rows[:, : rows.shape[1] // group * group].reshape(-1, group)
    scaled = cut / np.maximum(np.sqrt(np.mean(cut**2, axis=1, keepdims=True)), np.finfo(np.float32).tiny)
    counts, _ = np.histogram(scaled, edges)
    return (counts / (scaled.size * np.diff(edges))).tolist()


def _peaks(
    original: Decoder,
    tokenizer: "PreTrainedTokenizerBase",
    rotations: dict[str, KroneckerRotation],
    corpus: str,
) -> dict[str, dict[str, list[float]]]:
    text = corpora.load_corpus(corpus, "evaluation")
    windows = corpora.first_windows(text, tokenizer, original.config.vocab_size, _WINDOWS, _LENGTH)
    samples = pipeline.sample_inputs(original, windows, None)
    return {
        name: {"before": peak(samples[name]), "after": peak(_turned(samples[name], rotation))}
        for name, rotation in rotations.items()
    }


def _turned(samples: Float[np.ndarray, "l c m"], rotation: KroneckerRotation) -> Float[np.ndarray, "l c m"]:
    factors = (jnp.asarray(each, jnp.float32) for each in (rotation.left, rotation.right))
    return np.asarray(jax.vmap(kotms.rotate)(jnp.asarray(samples), *factors))


def peak(samples: Float[np.ndarray, "l c m"]) -> list[float]:
    """Return the largest absolute value of a token over its root mean square, mean over tokens, a layer each."""
    rms = np.sqrt(np.mean(np.square(samples, dtype=np.float64), axis=-1))
    held = rms > 0  # zeros stand for windows that only fill up a batch
    ratios = np.abs(samples).max(axis=-1) / np.where(held, rms, 1.0)
    return (ratios.sum(axis=-1) / np.maximum(held.sum(axis=-1), 1)).tolist()
