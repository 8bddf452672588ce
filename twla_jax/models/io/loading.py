"""Fills a decoder from named tensors, whatever file they come from."""

import functools
import itertools
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.stored_layers import StoredLayers
from twla_jax.models.stored_tensors import TensorSource

_AT_A_TIME = 2**18  # values that are checked: their flags stay in the processor's cache


def fill_decoder(
    config: DecoderConfig,
    source: TensorSource,
    table: Mapping[str, str],
    *,
    ignored: Collection[str],
    dtype=None,
    in_files: bool = False,
) -> Decoder:
    """Return a decoder whose parameters are numpy arrays read from `source`.

    Stacked arrays are filled layer by layer, so that nothing beside the model and one tensor is held.

    Args:
      config: settings of the decoder.
      source: where the tensors come from, for messages.
      table: from the decoder's parameter path (`blocks.q.kernel`) to the source's name, `{}` standing for the layer.
      ignored: names that may be left over.
      dtype: what the decoder computes in, float32 if None. Parameters stay in the source's type.
      in_files: leave the blocks' matrices where they are, as `StoredLayers`: each is read when it is asked for.

    Raises:
      TwlaError: a tensor is missing, has the wrong shape, holds NaN or infinity, or belongs to no parameter.
    """
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype or jnp.float32))
    parameters = dict(nnx.to_flat_state(nnx.state(decoder)))
    stored = {path: _stored_names(path, table, config) for path in parameters}
    wanted = [name for names in stored.values() for name in names]
    if missing := sorted(set(wanted) - set(source.names())):
        raise TwlaError(
            f"{source.where(missing[0])}: tensor {missing[0]!r} is missing ({len(missing)} of {len(wanted)} are)"
        )
    if unknown := sorted(set(source.names()) - set(wanted) - set(ignored)):
        raise TwlaError(
            f"{source.where(unknown[0])}: tensor {unknown[0]!r} has no place in a {config.model_type} decoder"
        )
    for path, parameter in parameters.items():  # before anything is allocated
        shape = parameter.get_value().shape[_stacked(path, table) :]
        for name in stored[path]:
            _check_shape(source, name, (*shape[:-2], *shape[:-3:-1]) if path[-1] == "kernel" else shape)
    for path, parameter in parameters.items():
        leaf_dtype = functools.reduce(jnp.promote_types, map(source.dtype, stored[path]))
        if in_files and path[0] == "blocks" and path[-1] == "kernel":
            shape = parameter.get_value().shape
            read = functools.partial(_read_layer, source, stored[path], shape, leaf_dtype)
            parameter.set_value(StoredLayers(read, shape, leaf_dtype))
            continue
        value = np.empty(parameter.get_value().shape, leaf_dtype)
        # A view with one leading axis: of layers, of layers and experts, or of the only tensor.
        slots = value.reshape(-1, *value.shape[_stacked(path, table) :])
        for slot, name in zip(slots, stored[path], strict=True):
            _copy_checked(source, name, slot, transposed=path[-1] == "kernel")
        parameter.set_value(value)
    nnx.update(decoder, nnx.from_flat_state(list(parameters.items())))
    return decoder


def _stacked(path: tuple, table: Mapping[str, str]) -> int:
    """Return how many leading axes of a parameter have a tensor an index: layers, and experts if stored so."""
    return table[".".join(map(str, path))].count("{}")


def _stored_names(path: tuple, table: Mapping[str, str], config: DecoderConfig) -> list[str]:
    sizes = (config.num_layers, config.num_experts)[: _stacked(path, table)]
    pattern = table[".".join(map(str, path))]
    return [pattern.format(*index) for index in itertools.product(*map(range, sizes))]


def _check_shape(source: TensorSource, name: str, expected: tuple[int, ...]) -> None:
    if source.shape(name) != expected:
        raise TwlaError(
            f"{source.where(name)}: tensor {name!r} has shape {list(source.shape(name))}, not {list(expected)}"
        )


def _read_layer(
    source: TensorSource, names: list[str], shape: tuple[int, ...], dtype: np.dtype, layer: int
) -> np.ndarray:
    """Return one layer of a parameter of this shape: a matrix, `[in, out]`, or its experts', `[experts, in, out]`.

    What a single tensor holds is a view of it, which lies the other way round.
    """
    matrices = [_read_matrix(source, name, dtype) for name in _of_layer(names, shape[0], layer)]
    return matrices[0].reshape(shape[1:]) if len(matrices) == 1 else np.stack(matrices)


def _of_layer(names: list[str], layers: int, layer: int) -> list[str]:
    each = len(names) // layers
    return names[layer * each : (layer + 1) * each]


def _read_matrix(source: TensorSource, name: str, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        matrix = source.read(name).astype(dtype, copy=False).swapaxes(-1, -2)
    _require_finite(source, name, matrix)
    return matrix


def _copy_checked(source: TensorSource, name: str, slot: np.ndarray, *, transposed: bool) -> None:
    tensor = source.read(name)
    # What overflows a narrower type is infinite, and found next, as NaN is.
    with np.errstate(over="ignore", invalid="ignore"):
        slot[...] = tensor.swapaxes(-1, -2) if transposed else tensor
    _require_finite(source, name, slot)


def _require_finite(source: TensorSource, name: str, values: np.ndarray) -> None:
    flat = (values if values.flags.c_contiguous else values.T).reshape(-1)
    parts = (flat[start : start + _AT_A_TIME] for start in range(0, flat.size, _AT_A_TIME))
    if bad := flat.size - sum(int(np.isfinite(part).sum()) for part in parts):
        raise TwlaError(f"{source.where(name)}: tensor {name!r} has {bad} NaN or infinite values")
