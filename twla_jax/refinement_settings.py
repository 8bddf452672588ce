"""Defines the settings of every refinement that a recipe may name."""

import dataclasses
from typing import ClassVar, Literal

from twla_jax.core.settings import ACTIVATION_BITS
from twla_jax.core.validation import Settings, ranged, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningSettings(Settings):
    """Settings that every refinement has.

    Attributes:
      steps: optimisation steps, each on `batch` windows.
      batch: windows a step.
      cooldown: share of the steps, the last, over which rates fall to zero; 1 for all that follow the rise.
      dtype: what the models compute in meanwhile; what is learned is float32.
    """

    steps: int = ranged(120, low=1)
    batch: int = ranged(4, low=1)
    cooldown: float = ranged(1.0, low=0, high=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def peak_rates(self) -> dict[str, float]:
        """Return Adam's peak learning rate by the kind of what learns."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSettings(LearningSettings):
    """Settings of a refinement that changes what a quantised model stores.

    Attributes:
      code_rate: peak learning rate for the codes' latents, in units of α.
      scale_rate: Adam's for α, μ (relative to α) and norms (relative to themselves).
      rotation_rate: the same for the rotations' factors, on the manifold; 0 keeps them.
      activation_bits: that the linear inputs are quantised to while it learns; 16 for none.
      code_optimizer: what moves the codes' latents: Muon, whose steps are orthogonal matrices, or Adam.
    """

    code_rate: float = ranged(5e-3, low=0)
    scale_rate: float = ranged(2e-3, low=0)
    rotation_rate: float = ranged(0.0, low=0)
    activation_bits: int = ranged(16, one_of=ACTIVATION_BITS)
    code_optimizer: Literal["adam", "muon"] = "adam"

    @property
    def peak_rates(self) -> dict[str, float]:
        """Return the peak rates of codes, scales and rotations."""
        codes = "codes" if self.code_optimizer == "adam" else "muon"
        return {codes: self.code_rate, "scales": self.scale_rate, "rotations": self.rotation_rate}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndToEndSettings(LatentSettings):
    """Settings of the refinement of the whole model towards the full-precision model's predictions.

    Each of its `steps · batch` windows is seen once. The other attributes are those of `LatentSettings`.

    Attributes:
      seq_len: tokens in a window, at most as many as in one of the calibration; 0 for as many.
      minutes: if not 0, as many steps are taken as there is time for, measured on the first ones; windows are seen
        again where `steps` are fewer.
      own_text: share of the windows that the full-precision model writes itself, from the text's beginnings on.
      streaming: whether blocks learn one after the other within a step, in the memory of a few blocks.
      latents: type of the codes' latents in a streaming refinement; with bfloat16 their moments are narrow, too.
      offload: whether a streaming refinement keeps latents and moments in the host's memory, on devices that can.
    """

    table: ClassVar[str] = "refine.end_to_end"

    seq_len: int = ranged(0, low=0)
    minutes: float = ranged(0.0, low=0)
    own_text: float = ranged(0.0, low=0, high=1)
    streaming: bool = False
    latents: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False

    def check(self) -> None:
        """Refuse what only a streaming refinement has."""
        wanted = "the default, or streaming = true beside it"
        require(self.streaming or self.latents == "float32", self.key("latents"), self.latents, wanted)
        require(self.streaming or not self.offload, self.key("offload"), self.offload, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockRefinementSettings(LatentSettings):
    """Settings of the refinement of each block towards the full-precision model's residual stream.

    The other attributes are those of `LatentSettings`; windows are drawn from those of the calibration.

    Attributes:
      steps: optimisation steps of each window of blocks.
      window: neighbouring blocks that learn together.
      mix: share of windows that enter a block as the full-precision model has them.
    """

    table: ClassVar[str] = "refine.blocks"

    steps: int = ranged(60, low=1)
    window: int = ranged(1, low=1)
    mix: float = ranged(0.0, low=0, high=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTrainingSettings(LearningSettings):
    """Settings of the training, after all else, in which clips alone learn.

    The other attributes are those of `LearningSettings`.

    Attributes:
      steps: optimisation steps.
      bits: of the linear inputs meanwhile; the clips that learn are those for so many bits.
      rate: Adam's peak learning rate for clips, relative to themselves.
    """

    table: ClassVar[str] = "refine.clips"

    steps: int = ranged(40, low=1)
    bits: int = ranged(4, one_of=ACTIVATION_BITS[:-1])
    rate: float = ranged(5e-3, low=0)

    @property
    def peak_rates(self) -> dict[str, float]:
        """Return the peak rate of clips."""
        return {"clips": self.rate}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineSettings(Settings):
    """Says which refinements follow the layer-wise quantisation, in this order; None leaves one out.

    Attributes:
      blocks: block by block.
      end_to_end: the whole model.
      clips: the clips alone.
    """

    table: ClassVar[str] = "refine"

    blocks: BlockRefinementSettings | None = None
    end_to_end: EndToEndSettings | None = None
    clips: ClipTrainingSettings | None = None

    @property
    def windows(self) -> int:
        """Return how many windows of their own the end-to-end steps need."""
        return self.end_to_end.steps * self.end_to_end.batch if self.end_to_end else 0
