"""Predicts the size of a quantised model from the original's configuration and a recipe, before any work."""

import collections
from typing import Any

from flax import nnx

from twla_jax.core import kotms
from twla_jax.core.settings import IntegerSettings, SymmetricSettings, TernarySettings, TwoPlaneSettings
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.folded_rotation import folded_config
from twla_jax.recipe import Recipe

_FLOAT = 2  # bytes of a number of what stays as it is: float16 or bfloat16
_QUANTIZER = 12  # bytes of an input's activation settings: int32 bits, four float16 clips


def predict(config: DecoderConfig, recipe: Recipe) -> dict[str, Any]:
    """Return what `accounting.account` will count, as far as it follows from shapes alone.

    Returns:
      A JSON-ready dict: `family`, `layers`, `weights`, `bits_per_weight_linear`, `bits_per_weight_model`, and `bytes`
      of the tensors by kind with their `total`. Bits and bytes are None for the published layout, where they depend on
      the weights. What stays as it is counts two bytes a number.

    Raises:
      TwlaError: the recipe folds rotations into a family whose stream cannot be rotated so.
    """
    config = folded_config(config) if recipe.folded_rotation else config
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    sizes: collections.Counter[str] = collections.Counter()
    weights, quantised, known = 0, 0, True
    linears = {name for site in model.blocks.sites for name in site.linears}
    for site in model.blocks.sites:
        kernels = [getattr(model.blocks, name).kernel.get_value() for name in site.linears]
        layers, m = kernels[0].shape[0], kernels[0].shape[-2]
        n = sum(kernel.size for kernel in kernels) // (layers * m)  # of all experts, where there are any
        quantised += layers * n * m
        row = _row_bytes(recipe, m)
        known &= row is not None
        sizes["linears"] += layers * n * (row or 0)
        sizes["clips"] += layers * _QUANTIZER
        if recipe.rotation is not None:
            left, right = kotms.factor_sizes(m, n, recipe.rotation.factors)
            sizes["rotations"] += layers * _FLOAT * (left * left + right * right)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable.get_value()
        weights += value.size
        name = ".".join(map(str, path))
        if name in ("embed", "head.kernel"):
            rows, m = (value.shape if name == "embed" else value.shape[::-1])[-2:]
            settings = recipe.embedding
            sizes["embeddings"] += rows * (
                _integer_row(m, settings.bits, settings.group_size) if settings else m * _FLOAT
            )
        elif not (path[0] == "blocks" and path[-1] == "kernel" and path[1] in linears):
            sizes["unquantised"] += value.size * _FLOAT
    of_linears = sizes["linears"] + sizes["rotations"] + sizes["clips"]
    return {
        "family": config.model_type,
        "layers": config.num_layers,
        "weights": weights,
        "quantized_weights": quantised,
        "recipe": recipe.name,
        "bits_per_weight_linear": 8 * of_linears / quantised if known else None,
        "bits_per_weight_model": 8 * sizes.total() / weights if known else None,
        "bytes": {**sizes, "total": sizes.total()} if known else None,
    }


def format_prediction(prediction: dict[str, Any]) -> str:
    """Return the figures of `predict` as lines of text."""
    lines = [
        f"{prediction['family']}, {prediction['layers']} layers, {prediction['weights']:,} weights: can be quantised",
    ]
    if prediction["bytes"] is None:
        return f"{lines[0]}\nby {prediction['recipe']}: the size depends on the weights"
    lines += [
        f"by {prediction['recipe']}:",
        f"bits per weight, linears   {prediction['bits_per_weight_linear']:8.3f}",
        f"bits per weight, model     {prediction['bits_per_weight_model']:8.3f}",
        *(f"  {kind:12}{size:16,} bytes" for kind, size in prediction["bytes"].items()),
        "with a tokenizer and descriptions beside that",
    ]
    return "\n".join(lines)


def _row_bytes(recipe: Recipe, columns: int) -> int | None:
    """Return the bytes of a row of weights with its scales; None where they depend on the weights."""
    quantizer, group = recipe.weights.quantizer, recipe.weights.group_size or columns
    groups = -(-columns // group)
    if isinstance(quantizer, TernarySettings):
        return -(-columns // 5) + 2 * _FLOAT * groups
    if isinstance(quantizer, SymmetricSettings):
        return -(-columns // 5) + _FLOAT * groups
    if isinstance(quantizer, TwoPlaneSettings):
        return 2 * -(-columns // 5) + 5 * groups
    if isinstance(quantizer, IntegerSettings):
        return _integer_row(columns, quantizer.bits, group)
    return None


def _integer_row(columns: int, bits: int, group_size: int) -> int:
    groups = -(-columns // (group_size or columns))
    return -(-columns * bits // 8) + _FLOAT * groups + -(-groups * bits // 8)
