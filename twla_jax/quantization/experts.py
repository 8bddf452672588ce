"""Quantises the experts of one layer: second moments of each, and all matrices in one vectorised sweep."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from twla_jax.core import gptq, kotms
from twla_jax.core.activation import fit_clips
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.settings import QuantizationSettings
from twla_jax.core.tensors import dequantize
from twla_jax.ops.expert_matmul import add_outer_products, block_size, expert_blocks

_CHUNK_BYTES = 2**32  # of the experts that are swept at the same time
_HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertMoments:
    """Holds sums over the tokens that each expert of a layer was given.

    Attributes:
      sums: `Σ xᵀx`, or of propagated errors `Σ (x₀ − x)ᵀx`.
      tokens: how many they are of.
    """

    sums: Float[Array, "experts m m"]
    tokens: Float[Array, " experts"]

    @classmethod
    def zeros(cls, experts: int, m: int) -> "ExpertMoments":
        """Return the sums of no token."""
        return cls(sums=jnp.zeros((experts, m, m)), tokens=jnp.zeros(experts))

    def add(
        self,
        left: Float[Array, "b t *k m"],
        x: Float[Array, "b t *k m"],
        experts: Int32[Array, "b t k"],
        real: Float[Array, " b"],
    ) -> "ExpertMoments":
        """Return the sums with `leftᵀ x` of some tokens added to those of their experts.

        Args:
          left: x, or x₀ − x; a row a token or a row for each of its experts.
          x: inputs of the linears, zero where they are not to count.
          experts: of each token.
          real: 0 for windows whose tokens do not count.
        """
        choices, count = experts.size, len(self.tokens)
        blocks = expert_blocks(experts.reshape(-1), count, block_size(choices, count))
        rows = (each.reshape(-1, each.shape[-1]).astype(jnp.float32) for each in (left, x))
        left, x = (blocks.gather(each, choices // len(each)) for each in rows)
        weights = jnp.broadcast_to(real[:, None, None], experts.shape).reshape(-1)
        return ExpertMoments(
            sums=add_outer_products(self.sums, left, x, blocks.experts),
            tokens=self.tokens.at[experts.reshape(-1)].add(weights),
        )

    @property
    def few(self) -> Bool[Array, " experts"]:
        """Return which experts saw fewer tokens than an input has features: their own moments are singular."""
        return self.tokens < self.sums.shape[-1]

    def of_own_or_all(self, few: Bool[Array, " experts"]) -> "ExpertMoments":
        """Return the moments to quantise by: an expert's own, or where it saw `few` tokens those of all together."""
        sums, tokens = self.sums.sum(0), self.tokens.sum()
        return ExpertMoments(
            sums=jnp.where(few[:, None, None], sums, self.sums), tokens=jnp.where(few, tokens, self.tokens)
        )


@functools.partial(jax.jit, static_argnames="settings")
def quantize_experts(
    kernels: tuple[Float[Array, "experts m n"], ...],
    rotation: KroneckerRotation | None,
    moments: ExpertMoments,
    sample: Float[Array, "c m"],
    errors: ExpertMoments | None = None,
    *,
    settings: QuantizationSettings,
) -> tuple[tuple[Any, ...], Float[Array, " 4"], dict[str, Float[Array, "*experts"]]]:
    """Rotate and quantise the linears of all experts that share one input, and fit that input's clips to the result.

    Args:
      kernels: of the linears, each of all experts.
      rotation: of their input, which all experts share.
      moments: of the input, before rotation.
      sample: some of its rows, before rotation.
      errors: of the same tokens, where propagated errors are made up for.
      settings: its `weights` and `activations` are read.

    Returns:
      The packed tensor of each linear, of all experts; the input's clips; and figures by name: the errors over all
      experts, the largest `damping`, and the `tokens` that each expert saw.
    """
    count, m = len(moments.tokens), kernels[0].shape[1]
    few = moments.few
    sides = (
        None if rotation is None else [side.astype(jnp.float32) for side in (rotation.left, rotation.right)]
    )
    if sides is not None:
        sample = kotms.rotate(sample, *sides)

    def turned(matrix: Float[Array, "n m"], both: bool) -> Float[Array, "n m"]:
        if rotation is None or sides is None:
            return matrix
        return kotms.rotate_moment(matrix, rotation) if both else kotms.rotate(matrix, *sides)

    def one(kernels, moment, tokens, own, error):
        rows = turned(jnp.concatenate([kernel.astype(jnp.float32).T for kernel in kernels]), False)
        error = None if error is None else turned(error, True)
        tensor, figures = gptq.quantize_matrix(
            rows, turned(moment, True), tokens, error, settings=settings.weights
        )
        dense = dequantize(tensor)
        own = turned(own, True)
        energies = [_energy(rows - dense, own), _energy(rows, own)]
        energies += [jnp.square(rows - dense).sum(), jnp.square(rows).sum()]
        return tensor, jnp.stack(energies), figures["damping"], jnp.matmul(dense.T, dense, precision=_HIGHEST)

    used = moments.of_own_or_all(few)
    error_sums = None if errors is None else errors.of_own_or_all(few).sums
    operands = kernels, used.sums, used.tokens, moments.sums, error_sums
    chunk = chunk_size(count, m, sum(kernel.shape[-1] for kernel in kernels))

    # A scan over chunks: what only some experts' sweeps need never exists for all.
    def sweep(metric, operands):
        tensor, energies, damping, metrics = jax.vmap(one)(*operands)
        return metric + metrics.sum(0), (tensor, energies, damping)

    chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), operands)
    metric, found = jax.lax.scan(sweep, jnp.zeros((m, m)), chunks)
    tensor, energies, damping = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)
    lost, all_output, changed, all_weights = energies.sum(0)
    figures = {
        "output_error": lost / jnp.maximum(all_output, 1e-30),
        "weight_error": changed / jnp.maximum(all_weights, 1e-30),
        "damping": damping.max(),
        "tokens": moments.tokens,
    }
    clips = fit_clips(sample, metric, settings.activations.clips)
    return _split(tensor, [kernel.shape[-1] for kernel in kernels]), clips, figures


def _energy(rows: Float[Array, "n m"], moment: Float[Array, "m m"]) -> Float[Array, ""]:
    return (jnp.matmul(rows, moment, precision=_HIGHEST) * rows).sum()


def _split(tensor: Any, sizes: list[int]) -> tuple[Any, ...]:
    """Return the tensor of each linear, from that of all their rows."""
    tensors, start = [], 0
    for size in sizes:
        tensors.append(jax.tree.map(lambda leaf, a=start, b=start + size: leaf[:, a:b], tensor))
        start += size
    return tuple(tensors)


def chunk_size(count: int, m: int, n: int) -> int:
    """Return how many of the experts are swept at a time, a divisor of `count`."""
    each = 4 * (8 * m * m + 6 * n * m)  # factors and moments, and weights on their way
    return next(
        size
        for size in range(count, 0, -1)
        if count % size == 0 and (size * each <= _CHUNK_BYTES or size == 1)
    )
