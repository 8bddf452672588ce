"""Counts the work of the block-wise transform from shapes alone, and says what it takes on a device of known speed."""

import collections
import dataclasses
import math

from twla_jax.core import kotms, quantizers
from twla_jax.core.settings import GroupedSettings, QuantizationSettings
from twla_jax.models.blocks import Site
from twla_jax.models.decoder import Decoder
from twla_jax.quantization.experts import chunk_size

_SWEPT = 128  # columns that each step of the sweep changes
# Shares of the speed of a large matrix product: of other products; of the steps of fitting a rotation, which are half
# elementwise; and of what is elementwise altogether.
_PRODUCTS, _ROTATIONS, _ELEMENTS = 0.8, 0.3, 0.02
_STEP_SECONDS = 2e-5  # that a device takes to begin a step of the sweep, however short
_COMPILE_SECONDS = 30.0  # of all programs, once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Says what large matrix products reach on a device, in operations a second: two for each multiply-add.

    Attributes:
      products: in the type that the model computes in.
      float32: in true float32, as moments, sweeps and rotations are computed in.
    """

    products: float
    float32: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockWork:
    """Counts what one block takes.

    Attributes:
      passes: operations of the forward passes, in the model's type.
      moments: operations of the second moments, in float32.
      factors: operations of the moments' factors; of experts, of their sweeps, too, of which no device takes a part.
      matrices: operations of the sweeps on whole matrices, as errors are pushed on; devices share their rows.
      elements: operations of the sweeps within a group, one by one.
      steps: of the sweeps, one after another.
      rotations: operations of the fits of rotations.
    """

    passes: float
    moments: float
    factors: float
    matrices: float
    elements: float
    steps: float
    rotations: float


def block_work(model: Decoder, windows: int, seq_len: int, settings: QuantizationSettings) -> BlockWork:
    """Return the work of one block.

    Args:
      model: its shapes alone are read.
      windows: of the calibration text.
      seq_len: tokens of a window.
      settings: of weights and rotations.
    """
    config, tokens = model.config, windows * seq_len
    streams = settings.weights.streams
    grouped = isinstance(settings.weights.quantizer, GroupedSettings)
    rounds = 1 if grouped else quantizers.quantizer(settings.weights).rounds
    passes = settings.weights.passes
    runs = _runs(model.sites)
    found: dict[str, float] = collections.defaultdict(float)
    for index, site in enumerate(model.sites):
        features = [linear.features for linear in model.blocks.linears(site)]
        m, n = features[0][0], sum(outputs for _, outputs in features)
        experts, taken = (config.num_experts, config.experts_per_token) if site.experts else (1, 1)
        chunks = experts // chunk_size(experts, m, n) if site.experts else 1
        found["passes"] += 2.0 * streams * tokens * taken * runs[index] * m * n
        lack = n if settings.weights.stream and model.blocks.adds(site) else 0
        found["moments"] += 2.0 * tokens * taken * m * (streams * m + lack)
        # The moments' factor, its inverse, and products of as many; and seven with every row, and one of each pass.
        found["factors"] += experts * 4.0 * m**3
        found["factors" if site.experts else "matrices"] += experts * (14.0 + 2.0 * passes) * n * m * m
        found["elements"] += 2.0 * (rounds + passes) * experts * n * m * _SWEPT
        found["steps"] += float((rounds + passes) * chunks * m)
        found["rotations"] += _rotation(m, n * experts, settings)
    # Scores and values of each token with all others.
    attention = 2 * seq_len * config.num_heads * config.head_dim
    found["passes"] += 2.0 * streams * tokens * attention
    return BlockWork(matrices=found.pop("matrices", 0.0), **found)


def _rotation(m: int, n: int, settings: QuantizationSettings) -> float:
    """Return the operations of fitting one rotation: forwards, and twice as many backwards."""
    rotation = settings.rotation
    if rotation is None:
        return 0.0
    rows = n // kotms.stride(n, rotation.rows)
    return 6.0 * rotation.steps * rows * m * sum(kotms.factor_sizes(m, n, rotation.factors))


def _runs(sites: tuple[Site, ...]) -> list[int]:
    """Return how often calibration runs each site: once more before an input that is not kept."""
    runs = [0] * len(sites)
    for index in range(len(sites) + 1):
        first = max((i for i in range(index) if not sites[i].recomputed), default=0)
        for each in range(first, index):
            runs[each] += 1
    return runs


def seconds(work: BlockWork, speed: Speed, devices: int = 1) -> tuple[float, float]:
    """Return the seconds of fitting one block's rotations, and of the rest of that block.

    Args:
      work: of the block.
      speed: of a device.
      devices: that windows, the rows of sweeps and the blocks' rotations are spread over; factors stay on all of them,
        and each begins all steps.
    """
    rotations = work.rotations / (_ROTATIONS * speed.float32 * devices)
    shared = work.passes / speed.products + (work.moments + work.matrices) / speed.float32
    elements = work.elements / (_ELEMENTS * speed.float32)
    products = (shared / devices + work.factors / speed.float32) / _PRODUCTS
    block = products + elements + _STEP_SECONDS * work.steps
    return rotations, block


def model_seconds(work: BlockWork, layers: int, speed: Speed, devices: int = 1) -> float:
    """Return the seconds of all blocks and their rotations, and of compiling what they share."""
    _, block = seconds(work, speed, devices)
    rotation, _ = seconds(work, speed)
    fits = math.ceil(layers / devices)  # of each device; some of the last ones have nothing to do
    return fits * rotation + layers * block + _COMPILE_SECONDS
