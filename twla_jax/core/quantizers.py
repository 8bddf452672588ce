"""Defines what the column sweep rounds to: one ternary plane, two, or plain integers, behind one interface.

`scales` are arrays of one value a row for the group at hand; codes are floats until they are packed.
"""

import abc
import dataclasses
from typing import Any, override

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from twla_jax.core import e2m_atq, tensors, two_planes, uniform
from twla_jax.core.grouped_tensor import GroupedTensor, salient_room
from twla_jax.core.settings import (
    GroupedSettings,
    IntegerSettings,
    Metric,
    SymmetricSettings,
    TernarySettings,
    TwoPlaneSettings,
    WeightSettings,
)
from twla_jax.core.tensors import IntegerTensor, TernaryTensor

Scales = tuple[Float[Array, "*rows"], ...]
PackedTensor = TernaryTensor | IntegerTensor | GroupedTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer(abc.ABC):
    """Fits, rounds and packs one group of columns, `[n, g]`.

    Attributes:
      rounds: how often codes are swept and scales relocated.
      metric: what `relocate` is to measure the output error in.
    """

    rounds: int
    metric: Metric

    @abc.abstractmethod
    def fit(self, w: Float[Array, "n g"], mask: Bool[Array, " g"]) -> tuple[Scales, Float[Array, "n g"]]:
        """Return scales `[n]` and codes `[n, g]` from the weights alone."""

    @abc.abstractmethod
    def relocate(
        self,
        w: Float[Array, "n g"],
        codes: Float[Array, "n g"],
        scales: Scales,
        metric: Float[Array, "g g"],
        mask: Bool[Array, " g"],
    ) -> Scales:
        """Return the scales `[n]` that cost the least output error at fixed codes."""

    @abc.abstractmethod
    def nearest(self, w: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
        """Return the codes whose values lie nearest to w, in its shape."""

    @abc.abstractmethod
    def values(
        self, codes: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """Return what codes stand for, in their shape."""

    @abc.abstractmethod
    def stored(self, codes: Float[Array, "n g"], scales: Scales) -> tuple[Float[Array, "n g"], Scales]:
        """Return codes and scales as they will be read back: rounded, and of equal choices the one that is stored."""

    @abc.abstractmethod
    def pack(self, codes: Num[Array, "*batch n m"], scales: Scales, group_size: int) -> PackedTensor:
        """Return the tensor that is kept, of scales `[..., n, groups]` that `stored` rounded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnePlane(Quantizer):
    """E2M-ATQ: scales `(α, μ)`, codes T in {-1, 0, 1}, levels `α·T + μ`; `fit` is stage 1, `relocate` stage 2.

    It is stored in steps that let integers add up across groups, α and μ in float16.
    """

    steps: int
    threshold: float

    @override
    def fit(self, w: Float[Array, "n g"], mask: Bool[Array, " g"]) -> tuple[Scales, Float[Array, "n g"]]:
        alpha, mu, codes = e2m_atq.euclidean_fit(w, mask, steps=self.steps, threshold=self.threshold)
        return (alpha, mu), codes

    @override
    def relocate(
        self,
        w: Float[Array, "n g"],
        codes: Float[Array, "n g"],
        scales: Scales,
        metric: Float[Array, "g g"],
        mask: Bool[Array, " g"],
    ) -> Scales:
        alpha, mu = scales
        return e2m_atq.relocate(w, codes, alpha, mu, metric, mask)

    @override
    def nearest(self, w: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
        alpha, mu = scales
        return e2m_atq.nearest_codes(w, alpha, mu)

    @override
    def values(
        self, codes: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        alpha, mu = scales
        return alpha * codes + mu

    @override
    def stored(self, codes: Float[Array, "n g"], scales: Scales) -> tuple[Float[Array, "n g"], Scales]:
        return codes, tuple(map(_float16, scales))

    @override
    def pack(self, codes: Num[Array, "*batch n m"], scales: Scales, group_size: int) -> TernaryTensor:
        alpha, mu = scales
        alpha, mu = tensors.in_whole_steps(alpha, mu, group_size)
        return tensors.from_codes(codes.astype(jnp.int8), alpha, mu, group_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmetricPlane(Quantizer):
    """Fits one plane without μ: scales `(α,)`, codes T in {-1, 0, 1}, levels `−α, 0, α`; no μ is stored."""

    threshold: float

    @override
    def fit(self, w: Float[Array, "n g"], mask: Bool[Array, " g"]) -> tuple[Scales, Float[Array, "n g"]]:
        alpha, codes = e2m_atq.symmetric_fit(w, mask, threshold=self.threshold)
        return (alpha,), codes

    @override
    def relocate(
        self,
        w: Float[Array, "n g"],
        codes: Float[Array, "n g"],
        scales: Scales,
        metric: Float[Array, "g g"],
        mask: Bool[Array, " g"],
    ) -> Scales:
        (alpha,) = scales
        return (e2m_atq.relocate_symmetric(w, codes, alpha, metric, mask),)

    @override
    def nearest(self, w: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
        (alpha,) = scales
        return e2m_atq.nearest_codes(w, alpha)

    @override
    def values(
        self, codes: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        (alpha,) = scales
        return alpha * codes

    @override
    def stored(self, codes: Float[Array, "n g"], scales: Scales) -> tuple[Float[Array, "n g"], Scales]:
        return codes, tuple(map(_float16, scales))

    @override
    def pack(self, codes: Num[Array, "*batch n m"], scales: Scales, group_size: int) -> TernaryTensor:
        (alpha,) = scales
        alpha, _ = tensors.in_whole_steps(alpha, None, group_size)
        return tensors.from_codes(codes.astype(jnp.int8), alpha, None, group_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPlanes(Quantizer):
    """Nine levels: scales `(α₁, α₂, μ)`, codes `3·T₁ + T₂` (digits), values `α₁·T₁ + α₂·T₂ + μ`.

    `fit` alternates least squares from several starts, `relocate` solves a 3×3 system for each row. It is stored as two
    packed planes, α₁ and μ in float16, α₂ as a byte's share of α₁.
    """

    steps: int

    @override
    def fit(self, w: Float[Array, "n g"], mask: Bool[Array, " g"]) -> tuple[Scales, Float[Array, "n g"]]:
        return two_planes.euclidean_fit(w, mask, steps=self.steps)

    @override
    def relocate(
        self,
        w: Float[Array, "n g"],
        codes: Float[Array, "n g"],
        scales: Scales,
        metric: Float[Array, "g g"],
        mask: Bool[Array, " g"],
    ) -> Scales:
        alpha, residual_alpha, mu = scales
        return two_planes.relocate(w, codes, (alpha, residual_alpha, mu), metric, mask)

    @override
    def nearest(self, w: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
        return two_planes.nearest_codes(w, *scales)

    @override
    def values(
        self, codes: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        return two_planes.values(codes, *scales)

    @override
    def stored(self, codes: Float[Array, "n g"], scales: Scales) -> tuple[Float[Array, "n g"], Scales]:
        alpha, residual_alpha, mu = scales
        codes, (alpha, residual_alpha, mu) = two_planes.ordered(codes, (alpha, residual_alpha, mu))
        ratio = tensors.nearest_ratio(alpha, residual_alpha) / tensors.RATIO_STEPS
        return codes, (_float16(alpha), _float16(alpha) * ratio, _float16(mu))

    @override
    def pack(self, codes: Num[Array, "*batch n m"], scales: Scales, group_size: int) -> TernaryTensor:
        (alpha, residual_alpha, mu), (first, second) = scales, two_planes.split(codes)
        return tensors.from_codes(
            first.astype(jnp.int8), alpha, mu, group_size, second.astype(jnp.int8), residual_alpha
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integers(Quantizer):
    """Equal steps: scales `(scale, zero)`, codes q in `[0, 2**bits)`, values `scale·(q − zero)`.

    `fit` finds the range of least error and rounds it; GPTQ does not move it, nor does `relocate`. Codes take a byte
    each, until they go to disk.
    """

    bits: int
    rounds: int = 1
    metric: Metric = "group"

    @override
    def fit(self, w: Float[Array, "n g"], mask: Bool[Array, " g"]) -> tuple[Scales, Float[Array, "n g"]]:
        scale, zero = uniform.fit_range(w, mask, self.bits)
        return (scale, zero), self.nearest(w, scale[:, None], zero[:, None])

    @override
    def relocate(
        self,
        w: Float[Array, "n g"],
        codes: Float[Array, "n g"],
        scales: Scales,
        metric: Float[Array, "g g"],
        mask: Bool[Array, " g"],
    ) -> Scales:
        return scales

    @override
    def nearest(self, w: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
        scale, zero = scales
        return uniform.nearest_code(w, scale, zero, self.bits)

    @override
    def values(
        self, codes: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        scale, zero = scales
        return scale * (codes - zero)

    @override
    def stored(self, codes: Float[Array, "n g"], scales: Scales) -> tuple[Float[Array, "n g"], Scales]:
        return codes, scales

    @override
    def pack(self, codes: Num[Array, "*batch n m"], scales: Scales, group_size: int) -> IntegerTensor:
        scale, zero = scales
        return IntegerTensor(
            codes=codes.astype(jnp.uint8),
            scale=scale.astype(jnp.float16),
            zero_point=zero.astype(jnp.uint8),
            in_features=codes.shape[-1],
            group_size=group_size,
            bits=self.bits,
        )


def quantizer(settings: WeightSettings) -> Quantizer:
    """Return the quantiser that settings stand for."""
    match settings.quantizer:
        case TernarySettings() as own:
            return OnePlane(
                steps=own.euclidean_steps, threshold=own.threshold, rounds=own.rounds, metric=own.metric
            )
        case SymmetricSettings() as own:
            return SymmetricPlane(threshold=own.threshold, rounds=own.rounds, metric=own.metric)
        case TwoPlaneSettings() as own:
            return TwoPlanes(steps=own.euclidean_steps, rounds=own.rounds, metric=own.metric)
        case IntegerSettings() as own:
            # Scales stay, so that one sweep finds all there is to find, and none where nothing is compensated.
            return Integers(bits=own.bits, rounds=1 if settings.compensation else 0)
        case GroupedSettings():
            raise TypeError("the published layout has groups of its own: see `grouped.quantize_in_groups`")


def tensor(settings: WeightSettings, fields: dict[str, Any], in_features: int) -> PackedTensor:
    """Return the tensor that the settings' quantiser packs, from what `arrays` says of it."""
    group_size = settings.group_size or in_features
    static: dict[str, Any] = {"in_features": in_features, "group_size": group_size}
    if isinstance(settings.quantizer, GroupedSettings):
        grouped = GroupedTensor(**fields, **static, salient_width=salient_room(in_features))
        return grouped.trimmed(max(grouped.salient_count(), 1))
    if isinstance(settings.quantizer, IntegerSettings):
        return IntegerTensor(**fields, **static, bits=settings.quantizer.bits)
    return TernaryTensor(**fields, **static)


def arrays(tensor: PackedTensor) -> dict[str, Array]:
    """Return the arrays that a tensor consists of, by field."""
    fields = (field for field in dataclasses.fields(tensor) if not field.metadata.get("static"))
    values = {field.name: getattr(tensor, field.name) for field in fields}
    return {name: value for name, value in values.items() if value is not None}


def _float16(p: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return p.astype(jnp.float16).astype(jnp.float32)
