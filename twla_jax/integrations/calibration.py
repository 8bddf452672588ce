"""Collects moments in one pass over batches, then packs every matched kernel, for Linen and NNX alike."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.integrations.packed_kernel import PackedKernel, pack_kernel
from twla_jax.integrations.providers import (
    SAMPLE_SUFFIX,
    STATS_SUFFIX,
    MomentProvider,
    Path,
    TwlaRule,
)

Stats = dict[Path, dict[str, jax.Array]]  # of each kernel: moment, tokens, sample
Report = dict[str, dict[str, float]]


def arguments(batch: Any) -> tuple[Any, ...]:
    """Return a batch as positional arguments of the model: a tuple as it is, anything else alone."""
    return batch if isinstance(batch, tuple) else (batch,)


def batch_stats(collected: Mapping[Any, Any]) -> Stats:
    """Return the statistics of one batch by kernel, from what the provider left in the collection `quant_stats`."""
    flat: dict[Any, Any] = flax.traverse_util.flatten_dict(
        dict(collected), is_leaf=lambda path, _: _is_stat(path)
    )
    stats: Stats = {}
    for path, value in flat.items():
        name = str(path[-1])
        if name.endswith(SAMPLE_SUFFIX):
            stats.setdefault((*path[:-1], name.removesuffix(SAMPLE_SUFFIX)), {})["sample"] = value
        elif name.endswith(STATS_SUFFIX):
            sums = {key: value[f"sum_of_{key}"] for key in ("moment", "tokens")}
            stats.setdefault((*path[:-1], name.removesuffix(STATS_SUFFIX)), {}).update(sums)
    return stats


def collect(observe: Callable[..., Stats], parameters: Any, batches: Iterable[Any]) -> Stats:
    """Return the statistics of all batches: sums, and the last batch's sample.

    Args:
      observe: maps parameters and the model's arguments to the statistics of one batch; compiled once a shape.
      parameters: of the model.
      batches: arrays, or tuples of positional arguments.

    Raises:
      TwlaError: there is no batch.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, parameters, args):
        return jax.tree.map_with_path(_added, total, observe(parameters, *args))

    total = None
    for batch in batches:
        args = arguments(batch)
        if total is None:
            shapes = jax.eval_shape(observe, parameters, *args)
            total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total = add(total, parameters, args)
    if total is None:
        raise TwlaError("there is no batch to calibrate on")
    return total


def pack_all(
    kernels: Mapping[Path, jax.Array], stats: Stats, provider: MomentProvider
) -> tuple[dict[Path, PackedKernel], Report]:
    """Pack every kernel that a rule matched, one at a time, and forget its statistics.

    Returns:
      The packed kernels, and for each the relative errors of outputs and weights.

    Raises:
      TwlaError: the inputs of a kernel are not finite.
    """
    packed: dict[Path, PackedKernel] = {}
    report: Report = {}
    for index, path in enumerate(sorted(stats, key=str)):
        name = "/".join(map(str, path))
        packed[path], figures = _pack(index, path, kernels[path], stats.pop(path), provider)
        report[name] = {key: float(np.asarray(value)) for key, value in figures.items()}
        if not np.isfinite(report[name]["output_error"]):
            raise TwlaError(f"{name}: its inputs on the given batches, or its weights, are not finite")
    return packed, report


def packed_shapes(
    kernels: Mapping[Path, Any], stats: Stats, provider: MomentProvider
) -> dict[Path, PackedKernel]:
    """Return what `pack_all` would pack, with the shapes of arrays in their place; computes nothing."""

    def shapes(path, kernel, stat):
        return jax.eval_shape(lambda kernel, stat: _pack(0, path, kernel, stat, provider)[0], kernel, stat)

    return {path: shapes(path, kernels[path], stats[path]) for path in stats}


def check_rules(rules: Sequence[Any], provider: MomentProvider) -> None:
    """Refuse rules that match nothing, which is how a typing error in a path shows.

    Raises:
      TwlaError: a rule matches no linear; names those that there are.
    """
    used = {rule.module_path for rule in provider.rules.values()}
    for rule in rules:
        if isinstance(rule, TwlaRule) and rule.module_path not in used:
            known = ", ".join(provider.seen) or "none"
            raise TwlaError(
                f"rule '{rule.module_path}' matches no linear of the model; its linears are {known}"
            )


def _pack(index, path, kernel, stat, provider):
    rule = provider.rules[path]
    return pack_kernel(
        kernel,
        stat["moment"],
        stat["tokens"],
        stat["sample"],
        jax.random.fold_in(jax.random.key(rule.rotation.seed), index),
        contracted=provider.contracted[path],
        weights=rule.weights,
        rotation=rule.rotation,
        activations=rule.activations,
    )


def _added(path, total, new):
    """Add up sums; keep the newer sample."""
    return new if path[-1] == jax.tree_util.DictKey("sample") else total + new


def _is_stat(path: Path) -> bool:
    return bool(path) and str(path[-1]).endswith((STATS_SUFFIX, SAMPLE_SUFFIX))
