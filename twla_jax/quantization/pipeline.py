"""The whole-model transform: block by block, each part calibrated on inputs that passed through the quantised ones.

Every kernel of a block becomes a packed tensor, every input of its linears gets a `KroneckerRotation` and an
`ActivationQuantizer`. Second moments are summed over batches of windows, so the inputs themselves are never kept; what
is kept is the residual stream, on the device where it fits and on the host where not.
"""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32
from tqdm import tqdm

from twla_jax.core import e2m_atq, gptq, kotms, quantizers
from twla_jax.core.activation import OFF, ActivationQuantizer, fit_clips
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.devices import warn_of_products
from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import check_vocabulary
from twla_jax.models import sharding
from twla_jax.models.decoder import SITES, Block, Decoder, Positions
from twla_jax.quantization import rotation_fitting
from twla_jax.quantization.embedding import quantize_embeddings
from twla_jax.quantization.stream import ResidualStream
from twla_jax.recipe import Recipe
from twla_jax.storage import resume

_RANGE_WINDOWS = 8  # of the calibration text, whose tokens the range of a rotated input is measured on
_RANGE_TOKENS = 256  # of these
_SNAPSHOT_SECONDS = 60  # between two copies of the residual stream to the working folder


def quantize(
    model: Decoder,
    windows: Int32[np.ndarray, "w s"],
    recipe: Recipe,
    *,
    work_dir: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> tuple[Decoder, dict[str, Any]]:
    """Quantises every linear of the blocks, and embedding and head where the recipe says so; norms stay as they are.

    Args:
      model: full precision; left as it is. Host (numpy) parameters go to the device one block at a time.
      windows: calibration tokens, for example from `calibration_windows`.
      recipe: its `calibration` part is not read; the windows stand for it.
      work_dir: finished rotations and blocks, and now and then the residual stream, are kept here; a later call with
        the same model, windows and recipe goes on from them.
      mesh: with axes `data` and `model`: windows are split over `data`, parameters as `sharding.shardings` says.
      progress: bars with an estimate of the time left, on stderr.
    Returns:
      The quantised model, and JSON-ready figures: `sites` (for each block and input `output_error`, `weight_error`,
      `damping`, `rotation_loss` before and after, `clips`) and `seconds` by stage.
    Raises:
      TwlaError: a token outside the vocabulary, a working folder of other work, or a layer whose errors are not finite.
    """
    warn_of_products()
    windows = np.asarray(windows, np.int32)
    check_vocabulary(windows, model.config.vocab_size)
    store = None if work_dir is None else _open_work_dir(Path(work_dir), model, windows, recipe)
    start = time.perf_counter()
    samples = _sample_inputs(model, windows, mesh) if recipe.rotation.looks_at_inputs else {}
    rotations, losses = rotation_fitting.fit_rotations(model, samples, recipe.rotation, store, progress)
    fitted = time.perf_counter()
    layers = _quantize_blocks(model, windows, rotations, recipe, store, mesh, progress)
    figures = [
        {
            "layer": index,
            "site": site,
            **{name: float(layers[index][f"{site}.{name}"]) for name in _FIGURES},
            "rotation_loss": losses[site][index].tolist() if site in losses else None,
            "clips": layers[index][f"{site}.clips"].tolist(),
        }
        for index in range(model.config.num_layers)
        for site in SITES
    ]
    seconds = {"rotations": fitted - start, "blocks": time.perf_counter() - fitted}
    quantised = quantize_embeddings(_assemble(model, rotations, layers, recipe), recipe.embedding)
    return quantised, {"sites": figures, "seconds": seconds}


def _open_work_dir(folder: Path, model: Decoder, windows: np.ndarray, recipe: Recipe) -> resume.WorkDir:
    settings = {
        "config": model.config.to_dict(),
        "recipe": {
            key: value
            for key, value in recipe.to_dict().items()
            if key not in ("name", "calibration", "allocation")
        },
        "dtype": model.dtype.name,
    }
    arrays = map(np.asarray, [windows, *jax.tree.leaves(model)])
    return resume.WorkDir(folder, resume.fingerprint(settings, arrays))


_FIGURES = ("output_error", "weight_error", "damping")


def _sample_inputs(
    model: Decoder, windows: np.ndarray, mesh: jax.sharding.Mesh | None
) -> dict[str, np.ndarray]:
    """For every site `[layers, c, m]`: some tokens of its input in the full-precision model."""
    stream = ResidualStream(model, windows[:_RANGE_WINDOWS], mesh)
    stream.start()
    stride, reach = max(1, stream.tokens // _RANGE_TOKENS), model.windows()
    samples: dict[str, list[np.ndarray]] = {site: [] for site in SITES}
    for index in range(model.config.num_layers):
        block = _place(jax.tree.map(lambda leaf, i=index: leaf[i], model.blocks), mesh)
        for site in SITES:
            samples[site].append(np.asarray(sample_site(block, stream, reach[index], site, stride)))
        for batch, _ in stream.batches():
            batch["x"] = finish(block, batch["x"])
    return {site: np.stack(parts) for site, parts in samples.items()}


def sample_site(
    block: Block, stream: ResidualStream, reach: Int32[Array, ""], site: str, stride: int
) -> Float[Array, "c m"]:
    """Moves the stream up to the input of `site`; returns every `stride`-th token of that input, float32."""
    samples = []
    for batch, real in stream.batches():
        here = (stream.positions, reach)
        batch["x"], batch["mixed"], _, sample, _ = advance(
            block, batch["x"], batch["mixed"], real, None, *here, site=site, stride=stride
        )
        samples.append(sample)
    return jnp.concatenate(samples)


def _quantize_blocks(
    model: Decoder,
    windows: np.ndarray,
    rotations: dict[str, KroneckerRotation],
    recipe: Recipe,
    store: resume.WorkDir | None,
    mesh: jax.sharding.Mesh | None,
    progress: bool,
) -> list[dict[str, np.ndarray]]:
    """What `_quantize_block` finds for every block, on the host."""
    config = model.config
    reach = model.windows()
    stream = ResidualStream(model, windows, mesh)
    # What is read below, so that recipes that differ elsewhere, as in their seeds, share one compilation.
    recipe = Recipe(weights=recipe.weights, activations=recipe.activations)
    reference = ResidualStream(model, windows, mesh) if recipe.weights.propagation else None
    layers: list[dict[str, np.ndarray]] = []
    first = 0
    if store and (snapshot := store.load("stream")):
        first = int(snapshot["layer"])
        layers = [saved for index in range(first) if (saved := store.load(f"block-{index}"))]
        if first < config.num_layers:
            stream.restore(snapshot["x"])
            if reference:
                reference.restore(snapshot["reference"])
    else:
        stream.start()
        if reference:
            reference.start()
    saved_at = time.perf_counter()
    with tqdm(
        total=config.num_layers, initial=first, desc="blocks", unit="block", disable=not progress
    ) as bar:
        for index in range(first, config.num_layers):
            block = _place(jax.tree.map(lambda leaf, i=index: leaf[i], model.blocks), mesh)
            here = {
                site: jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), r)
                for site, r in rotations.items()
            }
            result = jax.device_get(_quantize_block(block, here, stream, reference, reach[index], recipe))
            for site in SITES:
                if not all(np.isfinite(result[f"{site}.{name}"]) for name in _FIGURES):
                    raise TwlaError(
                        f"block {index}, input {site}: the error is not finite: its weights exceed float16's range, or"
                        f" its activations {model.dtype.name}'s"
                    )
            layers.append(result)
            bar.update()
            bar.set_postfix(output_error=f"{np.mean([result[f'{site}.output_error'] for site in SITES]):.3f}")
            if store:
                store.save(f"block-{index}", result)
                if time.perf_counter() - saved_at > _SNAPSHOT_SECONDS and index + 1 < config.num_layers:
                    snapshot = {"layer": np.asarray(index + 1), "x": stream.collect()}
                    if reference:
                        snapshot["reference"] = reference.collect()
                    store.save("stream", snapshot)
                    saved_at = time.perf_counter()
    if store and first < config.num_layers:
        # A later stage may be interrupted, and this one need not run again.
        store.save("stream", {"layer": np.asarray(config.num_layers), "x": np.zeros(0)})
    return layers


def _quantize_block(
    block: Block,
    rotations: dict[str, KroneckerRotation],
    stream: ResidualStream,
    reference: ResidualStream | None,
    reach: Int32[Array, ""],
    recipe: Recipe,
) -> dict[str, jax.Array]:
    """Quantises one block in place, input by input, and moves the stream past it.

    The `reference` is the stream of the full-precision model, which moves with it.

    Returns:
      `q.kernel.codes`, `q.kernel.alpha`, … for every linear, and for every input its clips and figures.
    """
    result = {}
    stride = max(1, stream.tokens // recipe.activations.clip_tokens)
    original = nnx.merge(*nnx.split(block))
    for site, names in SITES.items():
        linears = [getattr(block, name) for name in names]
        m = linears[0].kernel.get_value().shape[0]
        moment, samples = jnp.zeros((m, m), jnp.float32), []
        drift = jnp.zeros((m, m), jnp.float32) if reference else None
        pairs = zip(stream.batches(), reference.batches(), strict=True) if reference else None
        for (batch, real), (exact, _) in pairs or ((batch, ({}, None)) for batch in stream.batches()):
            here, keep = (stream.positions, reach), reference is not None
            batch["x"], batch["mixed"], moment, sample, h = advance(
                block, batch["x"], batch["mixed"], real, moment, *here, site=site, stride=stride, keep=keep
            )
            samples.append(sample)
            if reference:
                exact["x"], exact["mixed"], drift = advance_reference(
                    original, exact["x"], exact["mixed"], h, drift, *here, site=site
                )
        kernels = tuple(linear.kernel.get_value() for linear in linears)
        tensors, clips, figures = _quantize_site(
            kernels,
            rotations.get(site),
            moment,
            jnp.concatenate(samples),
            stream.tokens,
            drift,
            recipe=recipe,
        )
        for name, linear, tensor in zip(names, linears, tensors, strict=True):
            linear.kernel = nnx.Param(tensor)
            result |= {f"{name}.kernel.{part}": array for part, array in quantizers.arrays(tensor).items()}
        _set_input(getattr(block, f"{site}_input"), rotations.get(site), clips, recipe.activations.bits)
        result |= {f"{site}.clips": clips} | {f"{site}.{key}": value for key, value in figures.items()}
    for batch, _ in stream.batches():
        batch["x"] = finish(block, batch["x"])
    for batch, _ in reference.batches() if reference else ():
        batch["x"] = finish(original, batch["x"])
    return result


def _set_input(transform: Any, rotation: KroneckerRotation | None, clips: Any, bits: int) -> None:
    if rotation is not None:
        transform.rotation = nnx.data(nnx.Param(rotation))
    settings = jnp.full(clips.shape[:-1], bits, jnp.int32)
    transform.activation = nnx.data(
        nnx.Param(ActivationQuantizer(bits=settings, clips=clips, enabled=bits < OFF))
    )


@functools.partial(jax.jit, static_argnames=("site", "stride", "keep"), donate_argnames=("x", "moment"))
def advance(
    block: Block,
    x: Float[Array, "b s d"],
    mixed: Any,
    real: Float[Array, " b"],
    moment: Float[Array, "m m"] | None,
    positions: Positions,
    reach: Int32[Array, ""],
    *,
    site: str,
    stride: int,
    keep: bool = False,
) -> tuple[
    Float[Array, "b s d"], Any, Float[Array, "m m"] | None, Float[Array, "c m"], Float[Array, "b s m"] | None
]:
    """One batch up to the input of `site`: the stream, that input's second moments, a sample and perhaps all of it.

    The sample is every so many tokens; all of them are returned with `keep`, else None.
    `mixed` is the attention's output between the sites o and mlp, `[b, s, heads_d]`, and None elsewhere. Windows that
    only fill up a batch (`real` is 0) give zeros, which count for nothing in moments or clips. Without a `moment` to
    add to, none is taken.
    """
    x, mixed, h = _to_site(block, x, mixed, positions, reach, site)
    h = h * real[:, None, None].astype(h.dtype)
    sample = h.reshape(-1, h.shape[-1])[stride // 2 :: stride].astype(jnp.float32)
    if moment is not None:
        moment = gptq.accumulate_moment(moment, h)
    return x, mixed, moment, sample, h if keep else None


@functools.partial(jax.jit, static_argnames="site", donate_argnames=("x", "drift"))
def advance_reference(
    original: Block,
    x: Float[Array, "b s d"],
    mixed: Any,
    h: Float[Array, "b s m"],
    drift: Float[Array, "m m"],
    positions: Positions,
    reach: Int32[Array, ""],
    *,
    site: str,
) -> tuple[Float[Array, "b s d"], Any, Float[Array, "m m"]]:
    """The full-precision stream up to the input of `site`, and what it adds to the drift from h, its quantised twin.

    Where h is zero, as in windows that only fill up a batch, nothing is added.
    """
    x, mixed, exact = _to_site(original, x, mixed, positions, reach, site)
    h = h.reshape(-1, h.shape[-1]).astype(jnp.float32)
    difference = exact.reshape(h.shape).astype(jnp.float32) - h
    return x, mixed, drift + jnp.matmul(difference.T, h, precision=jax.lax.Precision.HIGHEST)


def _to_site(block, x, mixed, positions, reach, site):
    if site == "qkv":
        h = block.input_norm(x)
    elif site == "o":
        h = mixed = block.attend(block.qkv_input(block.input_norm(x)), positions, reach)
    elif site == "mlp":
        x, mixed = x + block.o(block.o_input(mixed)), None
        h = block.post_norm(x)
    else:
        h = block.gate_up(block.mlp_input(block.post_norm(x)))
    return x, mixed, h


@functools.partial(jax.jit, donate_argnames="x")
def finish(block: Block, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """From the MLP's residual to the block's output."""
    h = block.gate_up(block.mlp_input(block.post_norm(x)))
    return x + block.down(block.down_input(h))


@functools.partial(jax.jit, static_argnames="recipe")
def _quantize_site(
    kernels: tuple[Float[Array, "m n"], ...],
    rotation: KroneckerRotation | None,
    moment: Float[Array, "m m"],
    sample: Float[Array, "c m"],
    tokens: Float[Array, ""],
    drift: Float[Array, "m m"] | None = None,
    *,
    recipe: Recipe,
) -> tuple[tuple[Any, ...], Float[Array, " 4"], dict[str, Float[Array, ""]]]:
    """Rotates and quantises the linears that share one input, and fits that input's clips to the result."""
    rows = jnp.concatenate([kernel.astype(jnp.float32).T for kernel in kernels])
    if rotation is not None:
        left, right = rotation.left.astype(jnp.float32), rotation.right.astype(jnp.float32)
        rows, sample = kotms.rotate(rows, left, right), kotms.rotate(sample, left, right)
        moment = kotms.rotate_moment(moment, rotation)
        drift = None if drift is None else kotms.rotate_moment(drift, rotation)
    tensor, figures = gptq.quantize_matrix(rows, moment, tokens, drift, recipe=recipe.weights)
    dense = e2m_atq.dequantize(tensor)
    output_metric = jnp.matmul(dense.T, dense, precision=jax.lax.Precision.HIGHEST)
    clips = fit_clips(sample, output_metric, recipe.activations.clips)
    ends = np.cumsum([kernel.shape[1] for kernel in kernels])
    tensors = tuple(
        jax.tree.map(lambda leaf, rows=slice(end - kernel.shape[1], end): leaf[rows], tensor)
        for end, kernel in zip(ends, kernels, strict=True)
    )
    return tensors, clips, figures


def _place(block: Block, mesh: jax.sharding.Mesh | None) -> Block:
    if mesh is None:
        return jax.tree.map(jnp.asarray, block)
    return jax.device_put(block, sharding.shardings(block, mesh))


def _assemble(
    model: Decoder,
    rotations: dict[str, KroneckerRotation],
    layers: list[dict[str, np.ndarray]],
    recipe: Recipe,
) -> Decoder:
    """The quantised model: blocks stacked on the host, everything else shared with the original."""
    graph, state = nnx.split(model)
    quantised = nnx.merge(graph, state)

    def stacked(name) -> Any:
        return np.stack([layer[name] for layer in layers])

    for site, names in SITES.items():
        for name in names:
            linear = getattr(quantised.blocks, name)
            m = linear.kernel.get_value().shape[-2]
            prefix = f"{name}.kernel."
            parts = {key.removeprefix(prefix): stacked(key) for key in layers[0] if key.startswith(prefix)}
            linear.kernel = nnx.Param(quantizers.tensor(recipe.weights, parts, m))
        _set_input(
            getattr(quantised.blocks, f"{site}_input"),
            rotations.get(site),
            stacked(f"{site}.clips"),
            recipe.activations.bits,
        )
    return quantised
