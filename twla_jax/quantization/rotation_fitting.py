"""Fits the rotations of all blocks side by side: what `kotms` does for one input, over the layers of a model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twla_jax import hosts
from twla_jax.core import kotms
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.settings import RotationSettings
from twla_jax.devices import on_device
from twla_jax.models.decoder import Decoder
from twla_jax.progress import Bar
from twla_jax.storage import resume

_WEIGHTS = 2**23  # whose rotations are fitted at the same time


def fit_rotations(
    model: Decoder,
    samples: dict[str, np.ndarray],
    settings: RotationSettings | None,
    store: resume.WorkDir | None,
    mesh: Mesh | None,
    progress: bool,
) -> tuple[dict[str, KroneckerRotation], dict[str, np.ndarray]]:
    """Fit the rotations of every site, side by side over the blocks.

    Args:
      model: full precision.
      samples: `[layers, c, m]` inputs of each site, where the settings look at their range.
      settings: how they are fitted; None leaves the inputs unrotated.
      store: where finished sites are kept and looked for.
      mesh: whose devices take the blocks in turn.
      progress: a bar with an estimate of the time left, on stderr.

    Returns:
      By site the rotations of all blocks, stacked, on the host; and their losses `[layers, 2]`, before and after.
    """
    rotations, losses = {}, {}
    saved: Any
    if settings is None:
        return rotations, losses
    layers = model.config.num_layers
    with Bar(total=len(model.sites) * layers, desc="rotations", unit="input", disable=not progress) as bar:
        for index, (site, names, *_) in enumerate(model.sites):
            saved = hosts.from_first(lambda site=site: store.load(f"rotation-{site}")) if store else None
            if saved is None:
                key = jax.random.key(settings.seed + index)
                saved = _fit_site(model, names, key, samples.get(site), settings, mesh, bar)
                if store:
                    store.save(f"rotation-{site}", saved)
            else:
                bar.update(layers)
            rotations[site] = KroneckerRotation(saved["left"], saved["right"])
            losses[site] = saved["losses"]
    return rotations, losses


def _fit_site(
    model: Decoder,
    names: tuple[str, ...],
    key: jax.Array,
    sample: np.ndarray | None,
    settings: RotationSettings,
    mesh: Mesh | None,
    bar: Bar,
) -> dict[str, np.ndarray]:
    kernels = [getattr(model.blocks, name).kernel.get_value() for name in names]
    layers, m = kernels[0].shape[0], kernels[0].shape[-2]
    n = sum(kernel.size for kernel in kernels) // (layers * m)  # of all experts, where there are any
    sizes = kotms.factor_sizes(m, n, settings.factors)
    keys = jax.random.split(key, layers)
    n = -(-n // kotms.stride(n, settings.rows))
    split = 1 if mesh is None else mesh.size
    each = -(-layers // split)  # blocks of a device
    # Equal chunks, so that all of them share one compilation.
    fitting = (size for size in range(each, 1, -1) if each % size == 0 and size * n * m <= _WEIGHTS)
    chunk = next(fitting, 1) * split
    settings = dataclasses.replace(settings, seed=0)  # which is in the keys, and need not compile anew
    parts = []
    for start in range(0, layers, chunk):
        fitted = _fit_layers(start, chunk, kernels, keys, sample, mesh, settings=settings, sizes=sizes)
        parts.append(hosts.fetch(fitted))
        bar.update(min(chunk, layers - start))
    left, right, losses = (np.concatenate(arrays)[:layers] for arrays in zip(*parts, strict=True))
    return {"left": left, "right": right, "losses": losses}


def _fit_layers(
    start: int,
    count: int,
    kernels: list[Any],
    keys: jax.Array,
    sample: np.ndarray | None,
    mesh: Mesh | None,
    **static: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the factors and losses of `count` blocks from `start` on; those after the last block are the last again.

    On a mesh each device takes blocks of its own, and only their weights.
    """
    if mesh is None:
        here = slice(start, start + count)
        tokens = None if sample is None else on_device(sample[here])
        return _fit_chunk(tuple(on_device(kernel[here]) for kernel in kernels), keys[here], tokens, **static)
    over_layers = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def spread(array: Any) -> jax.Array:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            layers = range(start, start + count)[index[0]]
            return np.stack([np.asarray(array[min(layer, len(array) - 1)]) for layer in layers])

        return hosts.build(read, (count, *array.shape[1:]), over_layers)

    tokens = None if sample is None else spread(sample)
    data = spread(np.asarray(jax.random.key_data(keys)))
    return _fit_on_mesh(tuple(map(spread, kernels)), data, tokens, mesh, **static)


@functools.partial(jax.jit, static_argnames=("mesh", "settings", "sizes"))
def _fit_on_mesh(kernels, key_data, samples, mesh, *, settings, sizes):
    """Return what `_fit_chunk` does of all blocks, each from the device that has its weights."""

    def fit(kernels, key_data, samples):
        return _fit_chunk(
            kernels, jax.random.wrap_key_data(key_data), samples, settings=settings, sizes=sizes
        )

    over_layers = PartitionSpec(mesh.axis_names)
    return jax.shard_map(fit, mesh=mesh, in_specs=over_layers, out_specs=over_layers, check_vma=False)(
        kernels, key_data, samples
    )


@functools.partial(jax.jit, static_argnames=("settings", "sizes"))
def _fit_chunk(kernels, keys, samples, *, settings, sizes):
    turned = [jnp.swapaxes(kernel, -1, -2) for kernel in kernels]
    rows = jnp.concatenate([rows.reshape(len(rows), -1, rows.shape[-1]) for rows in turned], axis=-2)
    fit = functools.partial(kotms.fit_rotation, settings=settings, sizes=sizes)
    rotation, losses = jax.vmap(fit)(rows, keys, samples)
    return rotation.left, rotation.right, losses
