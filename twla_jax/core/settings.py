"""Defines the settings of the method: the weights' quantiser, error compensation, rotations and activations.

Each is a frozen dataclass that names everything its stage reads, and nothing else. Quantisers exclude each other, so
`WeightSettings.quantizer` is a union: what one of them does not read cannot be said to it.
"""

import dataclasses
from typing import ClassVar, Literal

from twla_jax.core.validation import Settings, ranged, require

ACTIVATION_BITS = (2, 4, 6, 8, 16)
SEED_LIMIT = 2**32 - 1
PER_ROW = "0 (one group a row) or more"

Metric = Literal["compensated", "group"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TernarySettings(Settings):
    """Settings of E2M-ATQ: one ternary plane, `α·T + μ`.

    Attributes:
      euclidean_steps: corrections of μ in stage 1.
      threshold: stage 1's dead zone, Δ = threshold · mean|w − μ|.
      rounds: alternations of the code sweep and the relocation of (α, μ); 0 leaves the codes of stage 1 (the paper).
      metric: what stage 2 measures the output error in: the group's own second moments (`group`, the paper), or their
        Schur complement given the columns not yet done (`compensated`).
    """

    table: ClassVar[str] = "weights.ternary"

    euclidean_steps: int = ranged(15, low=0)
    threshold: float = ranged(0.75, above=0)
    rounds: int = ranged(3, low=0)
    metric: Metric = "compensated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmetricSettings(Settings):
    """Settings of one ternary plane without an offset, `α·T`, which formats of other tools can hold.

    Attributes:
      threshold: stage 1's dead zone, Δ = threshold · mean|w|.
      rounds: as in `TernarySettings`.
      metric: as in `TernarySettings`.
    """

    table: ClassVar[str] = "weights.symmetric"

    threshold: float = ranged(0.75, above=0)
    rounds: int = ranged(3, low=0)
    metric: Metric = "compensated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPlaneSettings(Settings):
    """Settings of two ternary planes, `α₁·T₁ + α₂·T₂ + μ`.

    Attributes:
      euclidean_steps: alternations of codes and scales in stage 1, from each of its starts.
      rounds: as in `TernarySettings`.
      metric: as in `TernarySettings`.
    """

    table: ClassVar[str] = "weights.two_planes"

    euclidean_steps: int = ranged(15, low=0)
    rounds: int = ranged(3, low=0)
    metric: Metric = "compensated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerSettings(Settings):
    """Settings of plain asymmetric integers, to compare with: GPTQ, or rounding to nearest without compensation.

    Attributes:
      bits: of a weight.
    """

    table: ClassVar[str] = "weights.integer"

    bits: int = ranged(4, low=2, high=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedSettings(Settings):
    """Settings of the published layout: four groups in every 128 columns, each with planes and scales of its own.

    It has none of its own: groups, fits and rounds are those of the public code.
    """

    table: ClassVar[str] = "weights.published_groups"


QuantizerSettings = TernarySettings | SymmetricSettings | TwoPlaneSettings | IntegerSettings | GroupedSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompensationSettings(Settings):
    """Settings of error compensation: later columns make up for the errors of earlier ones, and of earlier layers.

    Attributes:
      damping: added to the diagonal of the second moments, as a share of its mean, before factoring.
      propagation: share of the error that earlier layers leave in the inputs that the weights are changed to make up
        for before they are quantised (QEP's β); 0 leaves that out.
      stream: the same of the error in the residual stream that outputs are added to. Only where both shares are 0 does
        calibration spare the pass of the full-precision model.
      passes: over all columns after the sweep, each of which chooses codes and scales anew with the others as they are.
    """

    table: ClassVar[str] = "weights.compensation"

    damping: float = ranged(0.01, above=0)
    propagation: float = ranged(0.5, low=0, high=1)
    stream: float = ranged(0.0, low=0, high=1)
    passes: int = ranged(0, low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSettings(Settings):
    """Settings of the weights: a quantiser, its groups, and error compensation.

    Attributes:
      quantizer: what weights are rounded to; in a recipe file the table `ternary`, `symmetric`, `two_planes`,
        `integer` or `published_groups`.
      group_size: columns that share scales; 0 gives each row a single group.
      compensation: None (`false` in a recipe file) rounds as if inputs were uncorrelated.
    """

    table: ClassVar[str] = "weights"

    quantizer: QuantizerSettings = TernarySettings()
    group_size: int = ranged(128, low=0, wanted=PER_ROW)
    compensation: CompensationSettings | None = CompensationSettings()

    def check(self) -> None:
        """Refuse what the published layout does not have: other groups, no compensation, propagated errors, passes."""
        if isinstance(self.quantizer, GroupedSettings):
            require(
                self.group_size == 128, self.key("group_size"), self.group_size, "128 in the published layout"
            )
            wanted = "a table: the published layout compensates errors"
            require(self.compensation is not None, self.key("compensation"), False, wanted)
            for name in ("propagation", "stream", "passes"):
                value, key = getattr(self.compensation, name), CompensationSettings.key(name)
                require(value == 0, key, value, "0 in the published layout")

    @property
    def streams(self) -> int:
        """Return how many residual streams a calibration carries: two where the original's is one of them."""
        return 2 if self.stream or (self.compensation and self.compensation.propagation) else 1

    @property
    def stream(self) -> float:
        """Return the share of what the residual stream lacks that is made up for; 0 where nothing is compensated."""
        return self.compensation.stream if self.compensation else 0.0

    @property
    def passes(self) -> int:
        """Return how many passes follow the sweep; 0 where nothing is compensated."""
        return self.compensation.passes if self.compensation else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotationSettings(Settings):
    """Settings of KOTMS, the Kronecker orthogonal tri-modal shaping of each linear input.

    Attributes:
      start: where the optimisation starts.
      factors: how m = l·r is split: l ≈ r (`balanced`) or the public code's size rule (`paper`).
      steps: optimisation steps; 0 keeps the start.
      rows: how many rows of the weights, at equal distances, the fit looks at; at least so many, 0 for all. A few
        hundred say as much of a few hundred numbers in the factors, in a fraction of the time.
      learning_rate: Adam's, on the Stiefel manifold.
      sigma: width of the three Gaussians, relative to the row's mean magnitude.
      balance: weight of the term that keeps the three modes equally full.
      range_weight: weight of the logarithm of the input's squared range, relative to its mean square: what an
        activation quantiser of given bits adds to the input as noise. 0 looks at the weights alone (the paper).
      retraction: how a step returns to the manifold.
      seed: of the random start.
    """

    table: ClassVar[str] = "rotation"

    start: Literal["random", "identity"] = "random"
    factors: Literal["balanced", "paper"] = "balanced"
    steps: int = ranged(100, low=0)
    rows: int = ranged(0, low=0)
    learning_rate: float = ranged(1e-2, above=0)
    sigma: float = ranged(0.25, above=0)
    balance: float = ranged(0.1, low=0)
    range_weight: float = ranged(0.0, low=0)
    retraction: Literal["polar", "cayley", "qr"] = "polar"
    seed: int = ranged(0, low=0, high=SEED_LIMIT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldedRotationSettings(Settings):
    """Settings of the random rotations that the full-precision model's own weights take up, before it is quantised.

    Attributes:
      value_heads: whether heads of values are rotated as well as the residual stream.
      seed: of the rotations.
    """

    table: ClassVar[str] = "folded_rotation"

    value_heads: bool = True
    seed: int = ranged(0, low=0, high=SEED_LIMIT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSettings(Settings):
    """Settings of the per-token activation quantiser.

    Attributes:
      bits: of every linear input; 16 leaves activations as they are. Clips are fitted for every bit-width, so
        the bits of a finished model can still be changed.
      clips: candidates for the clip factor; 1.0 must be among them.
      clip_tokens: calibration tokens that a clip is chosen on.
    """

    table: ClassVar[str] = "activations"

    bits: int = ranged(16, one_of=ACTIVATION_BITS)
    clips: tuple[float, ...] = ranged(
        (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5), above=0, high=1, wanted="within (0, 1]"
    )
    clip_tokens: int = ranged(4096, low=1)

    def check(self) -> None:
        """Refuse candidates without 1.0."""
        require(1.0 in self.clips, self.key("clips"), self.clips, "a list that holds 1.0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationSettings(Settings):
    """Settings of the block-wise transform: all that it reads, so that work on blocks outlives other changes.

    Attributes:
      weights: of every linear of a block.
      rotation: of every input; None leaves inputs unrotated.
      activations: of every input.
    """

    weights: WeightSettings = WeightSettings()
    rotation: RotationSettings | None = RotationSettings()
    activations: ActivationSettings = ActivationSettings()
