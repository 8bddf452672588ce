"""Fits the rotations of all blocks side by side: what `kotms` does for one input, over the layers of a model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    progress: bool,
) -> tuple[dict[str, KroneckerRotation], dict[str, np.ndarray]]:
    """Fit the rotations of every site, side by side over the blocks.

    Args:
      model: full precision.
      samples: `[layers, c, m]` inputs of each site, where the settings look at their range.
      settings: how they are fitted; None leaves the inputs unrotated.
      store: where finished sites are kept and looked for.
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
            saved = store.load(f"rotation-{site}") if store else None
            if saved is None:
                key = jax.random.key(settings.seed + index)
                saved = _fit_site(model, names, key, samples.get(site), settings, bar)
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
    bar: Bar,
) -> dict[str, np.ndarray]:
    kernels = [getattr(model.blocks, name).kernel.get_value() for name in names]
    layers, m = kernels[0].shape[0], kernels[0].shape[-2]
    n = sum(kernel.size for kernel in kernels) // (layers * m)  # of all experts, where there are any
    sizes = kotms.factor_sizes(m, n, settings.factors)
    keys = jax.random.split(key, layers)
    n = -(-n // kotms.stride(n, settings.rows))
    # Equal chunks, so that all of them share one compilation.
    fitting = (size for size in range(layers, 1, -1) if layers % size == 0 and size * n * m <= _WEIGHTS)
    chunk = next(fitting, 1)
    settings = dataclasses.replace(settings, seed=0)  # which is in the keys, and need not compile anew
    parts = []
    for start in range(0, layers, chunk):
        here = slice(start, start + chunk)
        rotation, loss = _fit_chunk(
            tuple(on_device(kernel[here]) for kernel in kernels),
            keys[here],
            None if sample is None else on_device(sample[here]),
            settings,
            sizes,
        )
        parts.append(
            {
                k: np.asarray(v)
                for k, v in (("left", rotation.left), ("right", rotation.right), ("losses", loss))
            }
        )
        bar.update(chunk)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _fit_chunk(kernels, keys, samples, settings, sizes):
    turned = [jnp.swapaxes(kernel, -1, -2) for kernel in kernels]
    rows = jnp.concatenate([rows.reshape(len(rows), -1, rows.shape[-1]) for rows in turned], axis=-2)
    return jax.vmap(functools.partial(kotms.fit_rotation, settings=settings, sizes=sizes))(
        rows, keys, samples
    )
