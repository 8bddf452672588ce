"""Quantises the linears of a Flax NNX model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import qwix
from flax import nnx

from twla_jax.integrations import calibration
from twla_jax.integrations.calibration import Report
from twla_jax.integrations.providers import MomentProvider, Path, TwlaProvider, TwlaRule


def quantize_nnx[Model: nnx.Module](
    model: Model, batches: Iterable[Any], rules: Sequence[TwlaRule]
) -> tuple[Model, Report]:
    """Make the linears of an NNX model ternary, by rules on module paths; as `quantize_linen` does.

    Args:
      model: any NNX module; it is not changed.
      batches: arrays, or tuples of the model's positional arguments.
      rules: the first that matches a module's path counts.

    Returns:
      A model of the same class in which each matched kernel is a `PackedKernel`, and for each kernel the relative
      errors of outputs and weights.

    Raises:
      TwlaError: a rule matches no linear, there is no batch, or inputs are not finite.
    """
    provider, observe, state = _observer(model, rules)
    stats = calibration.collect(observe, state, batches)
    calibration.check_rules(rules, provider)
    packed, report = calibration.pack_all(_kernels(model, stats), stats, provider)
    return _with_kernels(model, packed), report


def quantized_nnx_shapes[Model: nnx.Module](model: Model, batch: Any, rules: Sequence[TwlaRule]) -> Model:
    """Return the quantised model with shapes in the place of arrays: what orbax restores a saved state into.

    Args:
      model: the module that was quantised, of arrays or, from `nnx.eval_shape`, of shapes.
      batch: arguments of the model, or their shapes.
      rules: those it was quantised by.

    Raises:
      TwlaError: a rule matches no linear.
    """
    provider, observe, state = _observer(model, rules)
    stats = jax.eval_shape(observe, state, *calibration.arguments(batch))
    calibration.check_rules(rules, provider)
    packed = calibration.packed_shapes(_kernels(model, stats), stats, provider)
    graph, state = nnx.split(_with_kernels(model, packed))
    return nnx.merge(graph, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state))


def _observer(model, rules):
    provider = MomentProvider(rules)
    graph, state = nnx.split(_intercepted(model, provider))

    def observe(state, *args):
        traced = nnx.merge(graph, state)
        traced(*args)
        return calibration.batch_stats(nnx.to_pure_dict(nnx.state(traced, qwix.QuantStat)))

    return provider, observe, state


def _intercepted(model, provider):
    """Return the model as qwix runs it, without the call that qwix would make to set it up."""
    return qwix.quantize_model(model, provider, skip_nnx_init=True)


def _kernels(model: nnx.Module, paths: Iterable[Path]) -> dict[Path, Any]:
    modules = dict(nnx.iter_modules(model))
    return {path: getattr(modules[path[:-1]], path[-1]).get_value() for path in paths}


def _with_kernels(model, packed: Mapping[Path, Any]):
    changed = _intercepted(model, TwlaProvider())
    modules = dict(nnx.iter_modules(changed))
    for path, kernel in packed.items():
        setattr(modules[path[:-1]], path[-1], nnx.data(nnx.Param(kernel)))
    return changed
