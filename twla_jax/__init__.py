"""Ternary weights and low-bit activations for Llama-family language models in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twla_jax.activation import ActivationQuantizer
    from twla_jax.allocation import allocate_bits
    from twla_jax.calibration import Corpus, calibration_windows, load_corpus, tokenize
    from twla_jax.checkpoint import save
    from twla_jax.errors import TwlaError
    from twla_jax.evaluation import evaluate
    from twla_jax.generation import generate
    from twla_jax.kotms import KroneckerRotation
    from twla_jax.models import Decoder, DecoderConfig
    from twla_jax.models.integer import prepare_for_inference
    from twla_jax.pipeline import quantize
    from twla_jax.recipe import AllocationRecipe, CalibrationRecipe, Recipe, load_recipe
    from twla_jax.refinement import refine
    from twla_jax.self_calibration import sample_text
    from twla_jax.ternary import TernaryTensor
    from twla_jax.workflow import load, set_activation_bits

__version__ = "0.1.0"

# Where each public name lives. Imported when first used, so that `import twla_jax` and `twla --help` are quick.
_HOMES = {
    "ActivationQuantizer": "activation",
    "AllocationRecipe": "recipe",
    "CalibrationRecipe": "recipe",
    "Corpus": "calibration",
    "Decoder": "models",
    "DecoderConfig": "models",
    "KroneckerRotation": "kotms",
    "Recipe": "recipe",
    "TernaryTensor": "ternary",
    "TwlaError": "errors",
    "allocate_bits": "allocation",
    "calibration_windows": "calibration",
    "evaluate": "evaluation",
    "generate": "generation",
    "load": "workflow",
    "load_corpus": "calibration",
    "load_recipe": "recipe",
    "prepare_for_inference": "models.integer",
    "quantize": "pipeline",
    "refine": "refinement",
    "sample_text": "self_calibration",
    "save": "checkpoint",
    "set_activation_bits": "workflow",
    "tokenize": "calibration",
}

__all__ = [
    "ActivationQuantizer",
    "AllocationRecipe",
    "CalibrationRecipe",
    "Corpus",
    "Decoder",
    "DecoderConfig",
    "KroneckerRotation",
    "Recipe",
    "TernaryTensor",
    "TwlaError",
    "allocate_bits",
    "calibration_windows",
    "evaluate",
    "generate",
    "load",
    "load_corpus",
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
