"""Turns a model's residual stream and value heads by orthogonal matrices that its own weights take up.

QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406): a norm without a scale commutes with a rotation Q of the
stream. So each norm's scale goes into the linears after it, `W' = W·diag(g)·Qᵀ`, and what is added to the stream comes
out rotated, `W' = Q·W`. Attention mixes values linearly: heads of v are rotated by P, and o undoes it. The model
computes the same, its inputs have fewer outliers, and nothing is rotated at run time.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float32

from twla_jax.core import kotms
from twla_jax.core.settings import FoldedRotationSettings
from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.families import family_of
from twla_jax.models.families.llama import LlamaBlock
from twla_jax.models.stored_layers import StoredLayers

_log = logging.getLogger(__name__)
_ROWS = 8192  # that are rotated at a time: the embedding is not held in float32


@dataclasses.dataclass(frozen=True)
class _Rotations:
    """Holds the stream's rotation, `x ↦ vec(L·mat(x)·R)`, and those of each layer's value heads, if there are any."""

    left: Float32[np.ndarray, "l l"]
    right: Float32[np.ndarray, "r r"]
    heads: Float32[np.ndarray, "layers kv hd hd"] | None

    def rotated(self, rows: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
        """Return rows `[n, d]` times a norm's scale, rotated, in their dtype.

        Raises:
          TwlaError: the dtype cannot hold them.
        """
        result, sides = np.empty(rows.shape, rows.dtype), (len(self.left), len(self.right))
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS].astype(np.float32)
            part = part if scale is None else part * scale.astype(np.float32)
            tiles = np.matmul(self.left, part.reshape(-1, *sides) @ self.right)
            with np.errstate(over="ignore"):
                result[start : start + _ROWS] = tiles.reshape(part.shape)
            if not np.isfinite(result[start : start + _ROWS]).all():
                raise TwlaError(
                    f"folded_rotation: a weight exceeds the range of {rows.dtype}, the type of this model's weights;"
                    " leave the table out"
                )
        return result

    def of_values(self, values: np.ndarray, layer: int) -> np.ndarray:
        """Return values `[..., kv·hd]` with each head rotated, in their dtype."""
        if self.heads is None:
            return values
        heads = values.astype(np.float32).reshape(*values.shape[:-1], *self.heads.shape[1:3])
        return (
            np.einsum("...kh,khj->...kj", heads, self.heads[layer]).reshape(values.shape).astype(values.dtype)
        )

    def of_mix(self, kernel: np.ndarray, layer: int) -> np.ndarray:
        """Return o's kernel `[heads·hd, d]` for values that `of_values` rotated, in its dtype."""
        if self.heads is None:
            return kernel
        _, kv, hd, _ = self.heads.shape
        heads = kernel.astype(np.float32).reshape(kv, -1, hd, kernel.shape[-1])
        turned = np.einsum("kghd,khj->kgjd", heads, self.heads[layer])
        return turned.reshape(kernel.shape).astype(kernel.dtype)


def folded_config(config: DecoderConfig) -> DecoderConfig:
    """Return the settings of a model once rotations are folded into it: its head is not the embedding any more.

    Raises:
      TwlaError: a family whose stream cannot be rotated so.
    """
    block = family_of(config).block
    read = {site.norm for site in block.sites if not site.writes}
    if config.num_experts:
        raise TwlaError("folded_rotation: mixtures of experts are not rotated; leave the table out")
    if not issubclass(block, LlamaBlock) or None in read or set(block.norms) != read:
        raise TwlaError(
            f"folded_rotation: {config.model_type} norms what a sublayer adds to the stream, so no rotation of the"
            " stream folds into its weights; leave the table out"
        )
    return dataclasses.replace(config, tie_word_embeddings=False)


def fold_rotation(model: Decoder, settings: FoldedRotationSettings) -> Decoder:
    """Return a model of the same function, with random rotations folded into its weights and all norms' scales 1.

    An embedding that was the head as well is no more: the final norm's scale is in the head alone. Layers in files stay
    there, and are rotated when they are read.

    Args:
      model: full precision; left as it is.
      settings: which rotations.

    Raises:
      TwlaError: a family whose stream cannot be rotated so, or weights that their type then cannot hold.
    """
    config = folded_config(model.config)
    rotations = _random_rotations(config, settings)
    held = {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    if model.head is None:
        _log.warning("the head is no longer the embedding: %d bytes more, at its type", held["embed"].nbytes)
    head = np.asarray(held["embed"]) if model.head is None else np.asarray(held["head.kernel"]).T
    changed = {
        "embed": rotations.rotated(np.asarray(held["embed"])),
        "head.kernel": rotations.rotated(head, np.asarray(held["norm.scale"])).T,
        "norm.scale": np.ones_like(held["norm.scale"]),
        **{f"blocks.{norm}.scale": np.ones_like(held[f"blocks.{norm}.scale"]) for norm in model.blocks.norms},
    }
    for site in model.sites:
        scales = np.asarray(held[f"blocks.{site.norm}.scale"]) if site.norm else None
        for name in site.linears:
            for part in ("kernel", "bias"):
                if (value := held.get(path := f"blocks.{name}.{part}")) is not None:
                    change = functools.partial(_change, rotations, name, part, scales, site.writes)
                    changed[path] = _by_layer(value, change)
    folded = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=model.dtype))
    folded.fused = model.fused
    parameters = dict(nnx.to_flat_state(nnx.state(folded, nnx.Param)))
    for path, parameter in parameters.items():
        name = ".".join(map(str, path))
        parameter.set_value(changed[name] if name in changed else held[name])
    nnx.update(folded, nnx.from_flat_state(list(parameters.items())))
    return folded


def _change(
    rotations: _Rotations,
    name: str,
    part: str,
    scales: np.ndarray | None,
    writes: bool,
    value: np.ndarray,
    layer: int,
) -> np.ndarray:
    """Return the kernel `[m, n]` or bias `[n]` of one layer's linear with the rotations in it, in its dtype."""
    if part == "kernel" and scales is not None:
        value = rotations.rotated(value.T, scales[layer]).T
    if name == "v":
        value = rotations.of_values(value, layer)
    if name == "o" and part == "kernel":
        value = rotations.of_mix(value, layer)
    return rotations.rotated(np.atleast_2d(value)).reshape(value.shape) if writes else value


def _by_layer(stack: Any, change: Callable[[np.ndarray, int], np.ndarray]) -> Any:
    """Return a parameter `[layers, ...]` with each layer changed; one in files is changed when it is read."""
    if isinstance(stack, StoredLayers):
        return StoredLayers(lambda layer: change(stack[layer], layer), stack.shape, stack.dtype)
    return np.stack([change(np.asarray(stack[layer]), layer) for layer in range(len(stack))])


def _random_rotations(config: DecoderConfig, settings: FoldedRotationSettings) -> _Rotations:
    """Return random orthogonal matrices, made in float64: two factors for the stream, one for each value head."""
    rng = np.random.default_rng(settings.seed)
    sizes = kotms.factor_sizes(config.hidden_size, config.hidden_size, "balanced")
    left, right = (_random_orthogonal(rng, (size,)) for size in sizes)
    heads = None
    if settings.value_heads:
        heads = _random_orthogonal(rng, (config.num_layers, config.num_kv_heads, config.head_dim))
    return _Rotations(left, right, heads)


def _random_orthogonal(rng: np.random.Generator, sizes: tuple[int, ...]) -> Float32[np.ndarray, "*sizes n"]:
    q, r = np.linalg.qr(rng.normal(size=(*sizes, sizes[-1])))
    signs = np.sign(np.diagonal(r, axis1=-2, axis2=-1))  # which make it uniform
    return (q * signs[..., None, :]).astype(np.float32)
