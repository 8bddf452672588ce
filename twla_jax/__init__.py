"""Ternary weights and low-bit activations for Llama-family language models in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from twla_jax.version import __version__

if TYPE_CHECKING:
    from twla_jax.allocation.choice import allocate_bits
    from twla_jax.core.activation import ActivationQuantizer
    from twla_jax.core.kotms import KroneckerRotation
    from twla_jax.core.tensors import TernaryTensor
    from twla_jax.errors import TwlaError
    from twla_jax.evaluation.domains import evaluate_domains
    from twla_jax.evaluation.scoring import evaluate
    from twla_jax.inference.generation import generate
    from twla_jax.inference.packed_decoder import prepare_for_inference
    from twla_jax.inference.self_sampling import sample_text
    from twla_jax.jobs.loading import load
    from twla_jax.models import Decoder, DecoderConfig
    from twla_jax.models.sites import set_activation_bits
    from twla_jax.quantization.pipeline import quantize
    from twla_jax.recipe import AllocationSettings, CalibrationSettings, Recipe, load_recipe
    from twla_jax.refinement.end_to_end import refine
    from twla_jax.storage.checkpoint import save
    from twla_jax.text.corpora import Corpus, load_corpus, load_domains, tokenize
    from twla_jax.text.windows import calibration_windows

# Where each public name lives. Imported when first used, so that `import twla_jax` and `twla --help` are quick.
_HOMES = {
    "ActivationQuantizer": "core.activation",
    "AllocationSettings": "recipe",
    "CalibrationSettings": "recipe",
    "Corpus": "text.corpora",
    "Decoder": "models",
    "DecoderConfig": "models",
    "KroneckerRotation": "core.kotms",
    "Recipe": "recipe",
    "TernaryTensor": "core.tensors",
    "TwlaError": "errors",
    "allocate_bits": "allocation.choice",
    "calibration_windows": "text.windows",
    "evaluate": "evaluation.scoring",
    "evaluate_domains": "evaluation.domains",
    "generate": "inference.generation",
    "load": "jobs.loading",
    "load_corpus": "text.corpora",
    "load_domains": "text.corpora",
    "load_recipe": "recipe",
    "prepare_for_inference": "inference.packed_decoder",
    "quantize": "quantization.pipeline",
    "refine": "refinement.end_to_end",
    "sample_text": "inference.self_sampling",
    "save": "storage.checkpoint",
    "set_activation_bits": "models.sites",
    "tokenize": "text.corpora",
}

__all__ = [
    "ActivationQuantizer",
    "AllocationSettings",
    "CalibrationSettings",
    "Corpus",
    "Decoder",
    "DecoderConfig",
    "KroneckerRotation",
    "Recipe",
    "TernaryTensor",
    "TwlaError",
    "__version__",
    "allocate_bits",
    "calibration_windows",
    "evaluate",
    "evaluate_domains",
    "generate",
    "load",
    "load_corpus",
    "load_domains",
    "load_recipe",
    "prepare_for_inference",
    "quantize",
    "refine",
    "sample_text",
    "save",
    "set_activation_bits",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'twla_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(f"twla_jax.{_HOMES[name]}"), name)
