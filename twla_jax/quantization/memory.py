"""Predicts the memory of the block-wise transform from shapes alone; tests compare it with what XLA allocates."""

import math

from twla_jax.core import kotms
from twla_jax.core.settings import QuantizationSettings
from twla_jax.models.blocks import Site
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.ops.expert_matmul import block_size
from twla_jax.quantization.experts import chunk_size
from twla_jax.quantization.stream import BATCH_TOKENS, kept_beside, widest_kept

_FLOAT32 = 4
_QUERIES = 256  # at most, whose scores exist at the same time
# Of experts, copies of the matrices `[n, m]`, of the moments `[m, m]` and of the sampled tokens that exist together.
_ROWS, _MOMENTS, _SAMPLES = 4.5, 5, 2
_ROTATED = 10  # of the rows while a rotation is fitted: the loss's parts and their gradients


def block_bytes(model: Decoder, itemsize: int = 2) -> int:
    """Return the bytes of one block's matrices as they are stored, those of all experts among them."""
    linears = (linear for site in model.sites for linear in model.blocks.linears(site))
    return itemsize * sum(math.prod(linear.kernel.get_value().shape[1:]) for linear in linears)


def stream_bytes(
    model: Decoder, tokens: int, settings: QuantizationSettings, index: int | None = None
) -> int:
    """Return the bytes of the residual streams of all calibration tokens, with what a site reads instead.

    They are those while the streams stand at site `index`; at most, where it is None.
    """
    width = model.config.hidden_size + (widest_kept(model) if index is None else kept_beside(model, index))
    return tokens * model.dtype.itemsize * width * settings.weights.streams


def snapshot_bytes(model: Decoder, tokens: int, settings: QuantizationSettings) -> int:
    """Return the bytes of the residual streams between two blocks."""
    return tokens * model.dtype.itemsize * model.config.hidden_size * settings.weights.streams


def site_bytes(model: Decoder, site: Site, settings: QuantizationSettings) -> int:
    """Return the bytes of quantising the linears of one site at their peak, with the moments of its input."""
    features = _features(model, site)
    m, n = features[0][0], sum(outputs for _, outputs in features)
    square, rows, sample = m * m, n * m, settings.activations.clip_tokens * m
    streams, passes = settings.weights.streams, settings.weights.passes
    if site.experts:  # some are swept at a time; the moments that each is quantised by are there for all
        count = model.config.num_experts
        swept = chunk_size(count, m, n) * (_ROWS * rows + _MOMENTS * square)
        return int(_FLOAT32 * (swept + _SAMPLES * sample + 2 * streams * count * square))
    lack = (
        rows if settings.weights.stream and model.blocks.adds(site) else 0
    )  # of the stream, before it drifts
    steps = {  # of `quantization.site`
        "rotated": (streams + 2) * square + rows + 2 * lack + sample,
        "factored": 5 * square + 2 * rows + sample,
        "swept": 2 * square + 5.5 * rows + sample,
        "passed over": 3 * square + 8.5 * rows + sample if passes else 0,
        "clipped": square + rows + 4 * sample,
    }
    return int(_FLOAT32 * max(steps.values()))


def moment_bytes(model: Decoder, site: Site, settings: QuantizationSettings) -> int:
    """Return the bytes of the moments of one site's input, of each expert, with those of what is made up for."""
    m, n = _features(model, site)[0]
    count = model.config.num_experts if site.experts else 1
    lack = n if settings.weights.stream and model.blocks.adds(site) else 0
    return _FLOAT32 * count * m * (settings.weights.streams * m + lack)


def batch_bytes(model: Decoder, seq_len: int, windows: int) -> int:
    """Return the temporary bytes of one batch of windows on its way through a block."""
    config, itemsize = model.config, model.dtype.itemsize
    rows = max(1, min(windows, BATCH_TOKENS // seq_len))
    scores = _FLOAT32 * rows * config.num_heads * min(seq_len, _QUERIES) * seq_len
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    attention = 2 * scores + itemsize * rows * seq_len * (config.hidden_size + 2 * heads)
    if config.num_experts:
        gated = _experts_bytes(config, itemsize, rows * seq_len)
    else:
        gated = 4 * itemsize * rows * seq_len * config.intermediate_size
    return max(attention, gated)


def _experts_bytes(config: DecoderConfig, itemsize: int, tokens: int) -> int:
    """Return the temporary bytes of some tokens in their experts: rows in blocks, in float32 too for the moments."""
    d, hidden, count = config.hidden_size, config.intermediate_size, config.num_experts
    choices = tokens * config.experts_per_token
    rows = choices + count * (block_size(choices, count) - 1)  # with those that only fill up blocks
    matrices = 2 * count * d * hidden if itemsize > 2 else 0  # of gate and up, which are stored in 16 bits
    return itemsize * (rows * (d + 2 * hidden) + matrices) + _FLOAT32 * rows * max(d, hidden)


def rotation_bytes(model: Decoder, site: Site, settings: QuantizationSettings) -> int:
    """Return the bytes of fitting the rotation of one site in one block."""
    if settings.rotation is None:
        return 0
    features = _features(model, site)
    m, n = features[0][0], sum(outputs for _, outputs in features)
    n *= model.config.num_experts if site.experts else 1
    return _ROTATED * _FLOAT32 * m * (n // kotms.stride(n, settings.rotation.rows))


def _features(model: Decoder, site: Site) -> list[tuple[int, int]]:
    return [linear.features for linear in model.blocks.linears(site)]
