"""What the column sweep rounds to: one ternary plane, two, or plain integers, behind one small interface.

`scales` are arrays of one value a row for the group at hand; codes are floats until they are packed.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class Quantizer(Protocol):
    """Fits, rounds and packs one group of columns, `[n, g]`."""

    @property
    def rounds(self) -> int:
        """Return how often codes are swept and scales relocated."""
        ...

    @property
    def metric(self) -> Metric:
        """Return what `relocate` is to measure the output error in."""
        ...

    def fit(self, w: Float[Array, "n g"], mask: Bool[Array, " g"]) -> tuple[Scales, Float[Array, "n g"]]:
        """Return scales `[n]` and codes `[n, g]` from the weights alone."""
        ...

    def relocate(
        self,
        w: Float[Array, "n g"],
        codes: Float[Array, "n g"],
        scales: Scales,
        metric: Float[Array, "g g"],
        mask: Bool[Array, " g"],
    ) -> Scales:
        """Return the scales `[n]` that cost the least output error at fixed codes."""
        ...

    def nearest(self, w: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
        """Return the codes whose values lie nearest to w, in its shape."""
        ...

    def values(
        self, codes: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """Return what codes stand for, in their shape."""
        ...

    def stored(self, codes: Float[Array, "n g"], scales: Scales) -> tuple[Float[Array, "n g"], Scales]:
        """Return codes and scales as they will be read back: rounded, and of equal choices the one that is stored."""
        ...

    def pack(self, codes: Num[Array, "*batch n m"], scales: Scales, group_size: int) -> PackedTensor:
        """Return the tensor that is kept, of scales `[..., n, groups]` that `stored` rounded."""
        ...


@dataclasses.dataclass(frozen=True)
class OnePlane:
    """E2M-ATQ: levels `−α + μ, μ, α + μ`."""

    steps: int
    threshold: float
    rounds: int
    metric: Metric

    def fit(self, w: Float[Array, "n g"], mask: Bool[Array, " g"]) -> tuple[Scales, Float[Array, "n g"]]:
        """Return `(α, μ)` and codes of stage 1."""
        alpha, mu, codes = e2m_atq.euclidean_fit(w, mask, steps=self.steps, threshold=self.threshold)
        return (alpha, mu), codes

    def relocate(
        self,
        w: Float[Array, "n g"],
        codes: Float[Array, "n g"],
        scales: Scales,
        metric: Float[Array, "g g"],
        mask: Bool[Array, " g"],
    ) -> Scales:
        """Return `(α, μ)` of stage 2."""
        alpha, mu = scales
        return e2m_atq.relocate(w, codes, alpha, mu, metric, mask)

    def nearest(self, w: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
        """Return codes in {-1, 0, 1}."""
        alpha, mu = scales
        return e2m_atq.nearest_codes(w, alpha, mu)

    def values(
        self, codes: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """Return `α·T + μ`."""
        alpha, mu = scales
        return alpha * codes + mu

    def stored(self, codes: Float[Array, "n g"], scales: Scales) -> tuple[Float[Array, "n g"], Scales]:
        """Return the codes, and α and μ as float16 holds them."""
        return codes, tuple(map(_float16, scales))

    def pack(self, codes: Num[Array, "*batch n m"], scales: Scales, group_size: int) -> TernaryTensor:
        """Return one packed plane, in steps that let integers add up across groups."""
        alpha, mu = scales
        alpha, mu = tensors.in_whole_steps(alpha, mu, group_size)
        return tensors.from_codes(codes.astype(jnp.int8), alpha, mu, group_size)


@dataclasses.dataclass(frozen=True)
class SymmetricPlane(OnePlane):
    """One plane whose μ is 0: levels `−α, 0, α`; there are no corrections of μ, so `steps` is 0."""

    def fit(self, w: Float[Array, "n g"], mask: Bool[Array, " g"]) -> tuple[Scales, Float[Array, "n g"]]:
        """Return `(α, 0)` and codes of the weights alone."""
        alpha, codes = e2m_atq.symmetric_fit(w, mask, threshold=self.threshold)
        return (alpha, jnp.zeros_like(alpha)), codes

    def relocate(
        self,
        w: Float[Array, "n g"],
        codes: Float[Array, "n g"],
        scales: Scales,
        metric: Float[Array, "g g"],
        mask: Bool[Array, " g"],
    ) -> Scales:
        """Return `(α, 0)` of the least output error."""
        alpha, mu = scales
        return e2m_atq.relocate_symmetric(w, codes, alpha, metric, mask), mu


@dataclasses.dataclass(frozen=True)
class TwoPlanes:
    """Nine levels, `α₁·T₁ + α₂·T₂ + μ`."""

    steps: int
    rounds: int
    metric: Metric

    def fit(self, w: Float[Array, "n g"], mask: Bool[Array, " g"]) -> tuple[Scales, Float[Array, "n g"]]:
        """Return `(α₁, α₂, μ)` and digits of alternating least squares from several starts."""
        return two_planes.euclidean_fit(w, mask, steps=self.steps)

    def relocate(
        self,
        w: Float[Array, "n g"],
        codes: Float[Array, "n g"],
        scales: Scales,
        metric: Float[Array, "g g"],
        mask: Bool[Array, " g"],
    ) -> Scales:
        """Return `(α₁, α₂, μ)` of a 3×3 solve per row."""
        alpha, residual_alpha, mu = scales
        return two_planes.relocate(w, codes, (alpha, residual_alpha, mu), metric, mask)

    def nearest(self, w: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
        """Return digits `3·T₁ + T₂`."""
        return two_planes.nearest_codes(w, *scales)

    def values(
        self, codes: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """Return the levels of digits."""
        return two_planes.values(codes, *scales)

    def stored(self, codes: Float[Array, "n g"], scales: Scales) -> tuple[Float[Array, "n g"], Scales]:
        """Return digits and scales: α₁ and μ as float16 holds them, α₂ as a byte's share of α₁."""
        alpha, residual_alpha, mu = scales
        codes, (alpha, residual_alpha, mu) = two_planes.ordered(codes, (alpha, residual_alpha, mu))
        ratio = tensors.nearest_ratio(alpha, residual_alpha) / tensors.RATIO_STEPS
        return codes, (_float16(alpha), _float16(alpha) * ratio, _float16(mu))

    def pack(self, codes: Num[Array, "*batch n m"], scales: Scales, group_size: int) -> TernaryTensor:
        """Return two packed planes."""
        (alpha, residual_alpha, mu), (first, second) = scales, two_planes.split(codes)
        return tensors.from_codes(
            first.astype(jnp.int8), alpha, mu, group_size, second.astype(jnp.int8), residual_alpha
        )


@dataclasses.dataclass(frozen=True)
class Integers:
    """`2**bits` equal steps; scale and zero point stay as they were fitted."""

    bits: int
    rounds: int = 1
    metric: Metric = "group"

    def fit(self, w: Float[Array, "n g"], mask: Bool[Array, " g"]) -> tuple[Scales, Float[Array, "n g"]]:
        """Return scale and zero point of the range of least error, and nearest codes."""
        scale, zero = uniform.fit_range(w, mask, self.bits)
        return (scale, zero), self.nearest(w, scale[:, None], zero[:, None])

    def relocate(
        self,
        w: Float[Array, "n g"],
        codes: Float[Array, "n g"],
        scales: Scales,
        metric: Float[Array, "g g"],
        mask: Bool[Array, " g"],
    ) -> Scales:
        """Return the scales as they are: GPTQ does not move them."""
        return scales

    def nearest(self, w: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
        """Return codes in `[0, 2**bits)`."""
        scale, zero = scales
        return uniform.nearest_code(w, scale, zero, self.bits)

    def values(
        self, codes: Float[Array, "*shape"], *scales: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """Return `scale·(q − z)`."""
        scale, zero = scales
        return scale * (codes - zero)

    def stored(self, codes: Float[Array, "n g"], scales: Scales) -> tuple[Float[Array, "n g"], Scales]:
        """Return both as they are: `fit` rounded them."""
        return codes, scales

    def pack(self, codes: Num[Array, "*batch n m"], scales: Scales, group_size: int) -> IntegerTensor:
        """Return the integers at one byte a code, until they go to disk."""
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
            return OnePlane(own.euclidean_steps, own.threshold, own.rounds, own.metric)
        case SymmetricSettings() as own:
            return SymmetricPlane(0, own.threshold, own.rounds, own.metric)
        case TwoPlaneSettings() as own:
            return TwoPlanes(own.euclidean_steps, own.rounds, own.metric)
        case IntegerSettings() as own:
            # Scales stay, so that one sweep finds all there is to find, and none where nothing is compensated.
            return Integers(own.bits, rounds=1 if settings.compensation else 0)
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
