"""Defines what learns in refinement: float latents behind codes and scales, and the way back to packed tensors."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twla_jax import hosts
from twla_jax.core import kotms, packing, tensors, two_planes
from twla_jax.core.activation import (
    BIT_CHOICES,
    OFF,
    ActivationQuantizer,
    fake_quantize,
    select_clip,
    with_bits,
)
from twla_jax.core.tensors import per_column
from twla_jax.models.blocks import ChainBlock
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace
from twla_jax.refinement import two_plane_latents

_MARGIN = 0.45  # from its code, at most, that a latent starts: on the code's side of the rounding boundary
_REACH = 1.5  # latents beyond pass no gradient: their code is the outermost already
_LEAST_CLIP = 0.1  # that one may learn
_ROW_COST = 4  # inputs that are rotated in the time of a row of weights, which is in float32
Latents = dict[str, dict[str, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _StraightThrough:
    """An activation quantiser that gradients pass as if it were not there, save for those of its clip.

    `clip_offset` is how much wider the range is than the quantiser's own, relative to that.
    """

    quantizer: ActivationQuantizer
    clip_offset: Float[Array, "*batch"] | None

    def __call__(self, x: Float[Array, "*tokens m"]) -> Float[Array, "*tokens m"]:
        fixed = jax.lax.stop_gradient(x)
        if self.clip_offset is None:
            return x + jax.lax.stop_gradient(self.quantizer(x) - x)
        bits, clip = self.quantizer.bits, trained_clip(self.quantizer, self.clip_offset)
        return x + (fake_quantize(fixed, bits, clip, rounding=_round_straight) - fixed)


def init_latents(student: Decoder, teacher: Decoder, *, codes: bool = True) -> Latents:
    """Return what stands for the student as it is: linears' `u`, `s` and `r`, norms' `g`, rotations' factors.

    Of two planes each linear has a `residual_s`, too. Without `codes` there is no `u`, and codes stay as they are. A
    linear without μ (symmetric planes), or with zeros for it (those of earlier versions), has no `r`, and gets none.
    All are float32. u starts where the full-precision weight lies in units of α, but within its code's cell: the codes
    that the column sweep chose are kept, and those whose weight lies near a boundary are the first to change.

    Args:
      student: quantised.
      teacher: the model it was quantised from.
      codes: whether codes learn.
    """
    latents: Latents = {}
    for site in student.sites:
        transform = student.blocks.transform(site).rotation
        rotation = None if transform is None else transform.get_value()
        for name in site.linears:
            tensor = getattr(student.blocks, name).kernel.get_value()
            latents[name] = {"s": jnp.zeros(tensor.alpha.shape)}
            if tensor.mu is not None and jnp.any(tensor.mu):
                latents[name]["r"] = jnp.zeros(tensor.alpha.shape)
            if codes:
                kernel = getattr(teacher.blocks, name).kernel.get_value()
                latents[name]["u"] = _starts(kernel, tensor, rotation)
            if tensor.residual_alpha is not None:
                latents[name]["residual_s"] = jnp.zeros(tensor.alpha.shape)
        if rotation is not None:
            factors = {"left": rotation.left, "right": rotation.right}
            latents[f"{site.name}_input"] = {
                side: factor.astype(jnp.float32) for side, factor in factors.items()
            }
    for name in student.blocks.norms:
        latents[name] = {"g": jnp.zeros(getattr(student.blocks, name).scale.get_value().shape)}
    latents["norm"] = {"g": jnp.zeros(student.norm.scale.get_value().shape)}
    return latents


def apply(block: ChainBlock, latents: Latents, bits: int, tokens: int) -> ChainBlock:
    """Return the block with the weights, norms and inputs that `latents` stand for, its inputs at `bits`.

    A rotation moves from a site's input into its weights where their rows are far fewer than `tokens`, the inputs that
    the block will run on: `(x Qᵀ) Ŵᵀ = x (Ŵ Q)ᵀ`. Inputs that are quantised must be rotated themselves.
    """
    changes: dict[str, Any] = {}
    weights = {
        name: _dense(getattr(block, name).kernel.get_value(), latents[name])
        for name in _linears(block, latents)
    }
    for site in block.sites:
        path, parts = f"{site.name}_input", latents.get(f"{site.name}_input", {})
        transform, here = block.transform(site), {name for name in site.linears if name in weights}
        rotation = None if transform.rotation is None else transform.rotation.get_value()
        if "left" in parts:
            rotation = changes[f"{path}.rotation"] = kotms.KroneckerRotation(parts["left"], parts["right"])
        rows = sum(math.prod(weights[name].shape[:-1]) for name in here)
        movable = bits >= OFF and len(here) == len(site.linears)
        if rotation is not None and movable and _ROW_COST * rows <= tokens:
            weights |= {name: kotms.rotate_back(weights[name], rotation) for name in here}
            changes[f"{path}.rotation"] = None
        assert transform.activation is not None  # a student is quantised
        quantizer = with_bits(transform.activation.get_value(), bits)
        changes[f"{path}.activation"] = _StraightThrough(quantizer, parts.get("clip"))
    changes |= {f"{name}.kernel": jnp.swapaxes(weight, -1, -2) for name, weight in weights.items()}
    for name in filter(latents.__contains__, block.norms):
        scale = getattr(block, name).scale.get_value()
        changes[f"{name}.scale"] = scale.astype(jnp.float32) * (1 + latents[name]["g"])
    return replace(block, changes)


def trained_clip(quantizer: ActivationQuantizer, offset: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return the clip at the quantiser's bits, so much wider relative to itself; at most 1, the whole range."""
    clip = jnp.vectorize(select_clip, signature="(n),()->()")(quantizer.clips, quantizer.bits)
    return jnp.clip(clip * (1 + offset), _LEAST_CLIP, 1)


def scales(
    tensor: tensors.TernaryTensor, parts: dict[str, jax.Array]
) -> tuple[tuple[Float[Array, "*batch n groups"], ...], Float[Array, "*batch n groups"] | None]:
    """Return `(α,)`, or of two planes `(α₁, α₂)`, and μ, if there is one, under the offsets s and r, float32."""
    alpha, residual_alpha = tensor.alpha.astype(jnp.float32), tensor.residual_alpha
    mu = None if tensor.mu is None else tensor.mu.astype(jnp.float32)
    if mu is not None and "r" in parts:
        mu += (alpha if residual_alpha is None else two_plane_latents.unit(tensor)) * parts["r"]
    residual = () if residual_alpha is None else (residual_alpha * (1 + parts["residual_s"]),)
    return (alpha * (1 + parts["s"]), *residual), mu


def _dense(tensor: tensors.TernaryTensor, parts: dict[str, jax.Array]) -> Float[Array, "n m"]:
    """Return Ŵ, float32, through whose codes gradients pass straight."""
    if tensor.residual_alpha is not None:
        return two_plane_latents.dense(parts.get("u"), tensor, *scales(tensor, parts))
    spread = functools.partial(per_column, in_features=tensor.in_features, group_size=tensor.group_size)
    (alpha,), mu = scales(tensor, parts)
    codes = _straight_through(parts["u"]) if "u" in parts else _codes(tensor)
    dense = codes * spread(alpha)
    return dense if mu is None else dense + spread(mu)


def _codes(tensor: tensors.TernaryTensor) -> Float[Array, "*batch n m"]:
    return packing.unpack(tensor.codes, tensor.in_features).astype(jnp.float32) - 1


def _straight_through(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    passed = jnp.where(jnp.abs(u) < _REACH, u, jax.lax.stop_gradient(u))
    return passed + jax.lax.stop_gradient(_round(u) - passed)


def _round_straight(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def _round(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.clip(jnp.round(u), -1, 1)


@jax.jit
def _starts(kernels, tensors, rotations) -> Float[Array, "layers n m"]:
    return jax.lax.map(_start, (kernels, tensors, rotations))


def _start(layer) -> Float[Array, "n m"]:
    kernel, tensor, rotation = layer
    rows = jnp.swapaxes(kernel, -1, -2).astype(jnp.float32)
    if rotation is not None:
        rows = kotms.rotate(rows, rotation.left, rotation.right)
    if tensor.residual_alpha is not None:
        return two_plane_latents.start(rows, tensor)
    codes = _codes(tensor)
    alpha, mu = (
        per_column(p.astype(jnp.float32), tensor.in_features, tensor.group_size)
        for p in (tensor.alpha, tensor.offsets())
    )
    u = (rows - mu) / jnp.where(alpha == 0, jnp.inf, alpha)
    return codes + jnp.clip(u - codes, -_MARGIN, _MARGIN)


def harden(student: Decoder, latents: Latents, bits: int) -> Decoder:
    """Return the student, on the host, with what the latents stand for in its own format; clips are those at `bits`."""
    return jax.tree.map(hosts.fetch, harden_arrays(student, latents, bits))


def harden_arrays(student: Decoder, latents: Latents, bits: int) -> Decoder:
    """Return what `harden` does, its arrays where they are."""
    blocks = student.blocks
    changes: dict[str, Any] = {}
    for name in _linears(blocks, latents):
        changes[f"blocks.{name}.kernel"] = _hardened(getattr(blocks, name).kernel.get_value(), latents[name])
    for site in student.sites:
        path, parts = f"blocks.{site.name}_input", latents.get(f"{site.name}_input", {})
        if "left" in parts:
            changes[f"{path}.rotation"] = _stored_rotation(parts["left"], parts["right"])
        if "clip" in parts:
            activation = blocks.transform(site).activation
            assert activation is not None
            quantizer = activation.get_value()
            clip = trained_clip(with_bits(quantizer, bits), parts["clip"])
            clips = quantizer.clips.at[..., BIT_CHOICES.index(bits)].set(clip.astype(quantizer.clips.dtype))
            changes[f"{path}.activation"] = dataclasses.replace(quantizer, clips=clips)
    norms = {name: (f"blocks.{name}", getattr(blocks, name)) for name in blocks.norms}
    norms["norm"] = ("norm", student.norm)
    for name in filter(latents.__contains__, norms):
        path, norm = norms[name]
        changes[f"{path}.scale"] = _scaled(norm.scale.get_value(), latents[name]["g"])
    return replace(student, changes)


# One program for all that has one shape, not one for each operation.
@jax.jit
def _hardened(tensor: tensors.TernaryTensor, parts: dict[str, jax.Array]) -> tensors.TernaryTensor:
    """Return what the latents of a linear, or of a stack of them, stand for."""
    (alpha, *residual_alpha), mu = scales(tensor, parts)
    if residual_alpha:
        first, second = two_planes.split(two_plane_latents.codes(parts.get("u"), tensor))
        residual = (second.astype(jnp.int8), *residual_alpha)
    else:
        first, residual = _round(parts["u"]) if "u" in parts else _codes(tensor), ()
        alpha, mu = tensors.in_whole_steps(alpha, mu, tensor.group_size)
    return tensors.from_codes(first.astype(jnp.int8), alpha, mu, tensor.group_size, *residual)


@jax.jit
def _stored_rotation(
    left: Float[Array, "*batch l l"], right: Float[Array, "*batch r r"]
) -> kotms.KroneckerRotation:
    return kotms.KroneckerRotation(left.astype(jnp.float16), right.astype(jnp.float16))


@jax.jit
def _scaled(scale: Float[Array, "*batch d"], g: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    return (scale.astype(jnp.float32) * (1 + g)).astype(scale.dtype)


def flipped(before: Decoder, after: Decoder) -> float:
    """Return the share of codes that differ."""
    changed = total = 0
    for name in (name for site in before.sites for name in site.linears):
        for part in ("codes", "residual_codes"):
            pair = [
                getattr(getattr(model.blocks, name).kernel.get_value(), part) for model in (before, after)
            ]
            if pair[0] is not None:
                old, new = map(np.asarray, pair)  # of which some may be in files
                differs = old ^ new  # two bits a code
                changed += int(np.bitwise_count((differs | differs >> 1) & 0x55).sum())
                total += math.prod(getattr(before.blocks, name).kernel.get_value().shape)
    return changed / total


def _linears(block: ChainBlock, latents: Latents) -> list[str]:
    """Return the names of the linears that have latents."""
    return [name for site in block.sites for name in site.linears if name in latents]
