"""Quantises the linears of a Flax Linen model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import qwix

from twla_jax.integrations import calibration
from twla_jax.integrations.calibration import Report
from twla_jax.integrations.providers import MomentProvider, Path, TwlaProvider, TwlaRule


def quantize_linen(
    model: nn.Module, variables: Mapping[str, Any], batches: Iterable[Any], rules: Sequence[TwlaRule]
) -> tuple[nn.Module, dict[str, Any], Report]:
    """Make the linears of a Linen model ternary, by rules on module paths.

    One pass over the batches collects the second moments of all matched linears' inputs, as the full-precision model
    has them: a float32 matrix `[m, m]` for each. Then each kernel is rotated and swept on its own. Errors of earlier
    layers are not made up for, nothing is refined afterwards, and products unpack one kernel at a time instead of
    running on the packed kernels of `twla_jax.ops`.

    Args:
      model: any Linen module; it is not changed.
      variables: what `model.init` gave, trained.
      batches: arrays, or tuples of the model's positional arguments.
      rules: the first that matches a module's path counts.

    Returns:
      The model that runs packed kernels, its variables (each matched kernel a `PackedKernel`), and for each kernel
      the relative errors of outputs and weights.

    Raises:
      TwlaError: a rule matches no linear, there is no batch, or inputs are not finite.
    """
    provider, observe = _observer(model, rules)
    stats = calibration.collect(observe, variables, batches)
    calibration.check_rules(rules, provider)
    packed, report = calibration.pack_all(_kernels(variables, stats), stats, provider)
    return qwix.quantize_model(model, TwlaProvider()), _with_kernels(variables, packed), report


def quantized_linen_shapes(
    model: nn.Module, variables: Mapping[str, Any], batch: Any, rules: Sequence[TwlaRule]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model that runs packed kernels, and variables of shapes: what orbax restores a saved model into.

    Args:
      model: the module that was quantised.
      variables: arrays or their shapes, as of `jax.eval_shape(model.init, ...)`.
      batch: arguments of the model, or their shapes.
      rules: those it was quantised by.

    Raises:
      TwlaError: a rule matches no linear.
    """
    provider, observe = _observer(model, rules)
    stats = jax.eval_shape(observe, variables, *calibration.arguments(batch))
    calibration.check_rules(rules, provider)
    packed = calibration.packed_shapes(_kernels(variables, stats), stats, provider)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(variables))
    return qwix.quantize_model(model, TwlaProvider()), _with_kernels(shapes, packed)


def _observer(model, rules):
    provider = MomentProvider(rules)
    observed = qwix.quantize_model(model, provider)

    def observe(variables, *args):
        _, collected = observed.apply(variables, *args, mutable=["quant_stats"])
        return calibration.batch_stats(collected.get("quant_stats", {}))

    return provider, observe


def _kernels(variables: Mapping[str, Any], paths: Iterable[Path]) -> dict[Path, Any]:
    flat = flax.traverse_util.flatten_dict(dict(variables["params"]))
    return {path: nn.meta.unbox(flat[path]) for path in paths}


def _with_kernels(variables: Mapping[str, Any], packed: Mapping[Path, Any]) -> dict[str, Any]:
    flat = flax.traverse_util.flatten_dict(dict(variables["params"]))
    return {**variables, "params": flax.traverse_util.unflatten_dict({**flat, **packed})}
