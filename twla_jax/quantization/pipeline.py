"""Quantises the blocks of a model in order, each part calibrated on inputs that passed through the quantised ones.

Every kernel of a block becomes a packed tensor, every input of its linears gets a `KroneckerRotation` and an
`ActivationQuantizer`. Second moments are summed over batches of windows, so the inputs themselves are never kept; what
is kept is the residual stream, on the device where it fits and on the host where not.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from twla_jax import hosts
from twla_jax.core import quantizers
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.settings import GroupedSettings, QuantizationSettings
from twla_jax.devices import on_device, warn_if_triton_gemm
from twla_jax.errors import TwlaError
from twla_jax.models import sharding, stored_layers
from twla_jax.models.arguments import checked_tokens, require_full_precision, require_settings
from twla_jax.models.blocks import ChainBlock
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import Linear, replace
from twla_jax.models.stored_layers import StoredLayers
from twla_jax.progress import Bar
from twla_jax.quantization import rotation_fitting
from twla_jax.quantization.advance import finish_block, sample_site
from twla_jax.quantization.block import input_changes, quantize_block
from twla_jax.quantization.snapshots import Snapshots
from twla_jax.quantization.stream import ResidualStream
from twla_jax.storage import resume

_log = logging.getLogger(__name__)
_FORM = 3  # of what an interrupted quantisation leaves; work in another form is refused

_RANGE_WINDOWS = 8  # of the calibration text, whose tokens the range of a rotated input is measured on
_RANGE_TOKENS = 256  # of these


@resume.keeps_work_dir
def quantize_blocks(
    model: Decoder,
    windows: Int32[np.ndarray, "w s"],
    settings: QuantizationSettings,
    *,
    rotations: Mapping[str, KroneckerRotation] | None = None,
    work_dir: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> tuple[Decoder, dict[str, Any]]:
    """Quantise every linear of the blocks; norms, embedding and head stay as they are.

    Args:
      model: full precision; left as it is. Host (numpy) parameters go to the device one block at a time.
      windows: calibration tokens, for example from `calibration_windows`.
      settings: of weights, rotations and activations.
      rotations: of every site, with a leading axis of layers, as `settings.rotation` fits them: those of another model
        quantised from this one. None fits them.
      work_dir: finished rotations and blocks, and the residual stream after each block, are kept here; a later call
        with the same model, windows and settings goes on from them. Of a model whose layers are in files, the blocks
        of the result stay here, too. Of several hosts, each gives a folder of its own, and the first one's counts.
      mesh: with axes `data` and `model`: windows are split over `data`, parameters as `sharding.shardings` says; of
        several hosts, with the devices of all, each of which makes this call.
      progress: bars with an estimate of the time left, on stderr.

    Returns:
      The quantised model, and JSON-ready figures: `sites` (for each block and input `output_error`, `weight_error`,
      `damping`, `clips`, `rotation_loss` before and after a fit; of experts also `fewest_tokens` that one of them saw,
      and `pooled_experts`, which saw fewer than the input has features and were quantised by the moments of all)
      and `seconds` by stage.

    Raises:
      TwlaError: the model is quantised already, what `checked_tokens` refuses, a working folder of other work, or a
        layer whose errors are not finite.
    """
    warn_if_triton_gemm()
    require_full_precision(model)
    require_settings(settings, QuantizationSettings, "settings")
    windows = checked_tokens(windows, model.config, "windows")
    if model.config.num_experts and isinstance(settings.weights.quantizer, GroupedSettings):
        raise TwlaError("settings: the published layout has no form for experts; take another quantizer")
    store = None if work_dir is None else _open_work_dir(Path(work_dir), model, windows, settings, rotations)
    start = time.perf_counter()
    losses: dict[str, np.ndarray] = {}
    if rotations is None:
        looks_at_inputs = settings.rotation is not None and settings.rotation.range_weight > 0
        samples = sample_inputs(model, windows, mesh) if looks_at_inputs else {}
        rotations, losses = rotation_fitting.fit_rotations(
            model, samples, settings.rotation, store, mesh, progress
        )
    fitted = time.perf_counter()
    layers = _quantize_blocks(model, windows, rotations, settings, store, mesh, progress)
    figures = [
        {
            "layer": index,
            "site": site.name,
            **{name: float(layers[index][f"{site.name}.{name}"]) for name in _FIGURES},
            "rotation_loss": losses[site.name][index].tolist() if site.name in losses else None,
            "clips": layers[index][f"{site.name}.clips"].tolist(),
            **_expert_figures(layers[index].get(f"{site.name}.tokens"), model.blocks.linears(site)[0]),
        }
        for index in range(model.config.num_layers)
        for site in model.sites
    ]
    _say_how_many_are_pooled(figures, model.config.num_experts)
    seconds = {"rotations": fitted - start, "blocks": time.perf_counter() - fitted}
    return _assemble(model, rotations, layers, settings, store), {"sites": figures, "seconds": seconds}


def _open_work_dir(
    folder: Path,
    model: Decoder,
    windows: np.ndarray,
    settings: QuantizationSettings,
    rotations: Mapping[str, KroneckerRotation] | None = None,
) -> resume.WorkDir:
    work = {
        "form": _FORM,
        "config": model.config.to_dict(),
        "settings": settings.to_dict(),
        "dtype": model.dtype.name,
    }
    known = map(np.asarray, jax.tree.leaves(dict(rotations or {})))
    identity = resume.fingerprint(work, [np.asarray(windows), *resume.leaves(model), *known])
    hosts.require_same(identity, "model, text or recipe")
    return resume.WorkDir(folder, identity)


class Absent(NamedTuple):
    """Stands for an array that is in the working folder."""

    shape: tuple[int, ...]
    dtype: np.dtype


_PACKED = ".kernel."  # in the names of packed weights
_FIGURES = ("output_error", "weight_error", "damping")


def _expert_figures(tokens: np.ndarray | None, linear: Linear) -> dict[str, Any]:
    """Return the tokens of the expert that saw the fewest, and which saw too few for moments of their own."""
    if tokens is None:
        return {}
    pooled = np.flatnonzero(tokens < linear.features[0])
    return {"fewest_tokens": int(tokens.min()), "pooled_experts": pooled.tolist()}


def _say_how_many_are_pooled(figures: list[dict[str, Any]], experts: int) -> None:
    counts = [len(site["pooled_experts"]) for site in figures if "pooled_experts" in site]
    if sum(counts):
        _log.warning(
            "%d of %d experts' inputs saw fewer tokens than they have features and were quantised by their layer's"
            " moments; more calibration text helps, and the report names them",
            sum(counts),
            experts * len(counts),
        )


def sample_inputs(
    model: Decoder, windows: np.ndarray, mesh: jax.sharding.Mesh | None
) -> dict[str, np.ndarray]:
    """Return for every site `[layers, c, m]`: some tokens of its input in the full-precision model."""
    stream = ResidualStream(model, windows[:_RANGE_WINDOWS], mesh)
    stream.start()
    stride = max(1, stream.tokens // _RANGE_TOKENS)
    samples: dict[str, list[np.ndarray]] = {site.name: [] for site in model.sites}
    for index, block in enumerate(stored_layers.in_turn(model.blocks, 0, model.config.num_layers)):
        block, context = _place(block, mesh), stream.context.layer(index)
        for at, site in enumerate(block.sites):
            samples[site.name].append(hosts.fetch(sample_site(block, stream, context, at, stride)))
        finish_block(block, stream, context)
    return {site: np.stack(parts) for site, parts in samples.items()}


def _quantize_blocks(
    model: Decoder,
    windows: np.ndarray,
    rotations: Mapping[str, KroneckerRotation],
    settings: QuantizationSettings,
    store: resume.WorkDir | None,
    mesh: jax.sharding.Mesh | None,
    progress: bool,
) -> list[dict[str, Any]]:
    """Return what `quantize_block` finds for every block, on the host.

    Where the layers of a model are in files, packed weights are left out: they stay in the working folder.
    """
    count = model.config.num_layers
    folder = store.folder if store else None
    described = functools.partial(
        ResidualStream, model, windows, mesh, folder, streams=settings.weights.streams
    )
    stream = described()
    # Rotations are fitted: without their settings, those that differ in them share one compilation.
    settings = dataclasses.replace(settings, rotation=None)
    reference = described() if settings.weights.streams == 2 else None
    streams = {"x": stream, "reference": reference}
    leaves_packed = _leaves_packed(model, settings, store)

    def held(result: dict[str, np.ndarray]) -> dict[str, Any]:
        return {
            k: Absent(v.shape, v.dtype) if leaves_packed and _PACKED in k else v for k, v in result.items()
        }

    layers: list[dict[str, Any]] = []
    with Snapshots(store) as snapshots:
        first, kept = snapshots.load() or (0, None)
        if kept is not None:
            layers = [held(snapshots.block(index)) for index in range(first)]
        for name, each in streams.items():
            if each is not None and first < count:
                each.start() if kept is None else each.restore(kept[name])
        bar = Bar(total=count, initial=first, desc="blocks", unit="block", disable=not progress)
        with bar:
            for index, block in enumerate(stored_layers.in_turn(model.blocks, first, count), first):
                here = {
                    site: stream.everywhere(jax.tree.map(lambda leaf, i=index: leaf[i], r))
                    for site, r in rotations.items()
                }
                context = stream.context.layer(index)
                result = hosts.fetch(
                    quantize_block(_place(block, mesh), here, stream, reference, context, settings)
                )
                _require_finite(model, index, result)
                snapshots.keep_block(index, result)
                if index + 1 < count:
                    snapshots.keep_streams(index + 1, streams)
                layers.append(held(result))
                bar.update()
                errors = [result[f"{site.name}.output_error"] for site in model.sites]
                bar.set_postfix(output_error=f"{np.mean(errors):.3f}")
        if first < count:
            snapshots.keep_end(count)
    return layers


def _require_finite(model: Decoder, index: int, result: dict[str, np.ndarray]) -> None:
    for site in model.sites:
        if not all(np.isfinite(result[f"{site.name}.{name}"]) for name in _FIGURES):
            raise TwlaError(
                f"block {index}, input {site.name}: the error is not finite: its weights exceed float16's"
                f" range, or its activations {model.dtype.name}'s"
            )


def _leaves_packed(model: Decoder, settings: QuantizationSettings, store: resume.WorkDir | None) -> bool:
    """Return whether packed weights stay in the working folder; those of the published layout are cut to one width."""
    grouped = isinstance(settings.weights.quantizer, GroupedSettings)
    return store is not None and not grouped and stored_layers.in_files(model)


def _place(block: ChainBlock, mesh: jax.sharding.Mesh | None) -> ChainBlock:
    if mesh is None:
        return jax.tree.map(_to_device, block)
    return sharding.place(block, mesh)


def _to_device(leaf: Any) -> jax.Array:
    """Return the array on the device; one that lies the other way round in memory is turned there, where it is fast."""
    turned = isinstance(leaf, np.ndarray) and leaf.ndim == 2 and leaf.flags.f_contiguous
    return on_device(leaf.T).T if turned else on_device(leaf)


def _read_packed(store: resume.WorkDir, name: str, layer: int) -> np.ndarray:
    return store.require(f"block-{layer}", name)[name]


def _assemble(
    model: Decoder,
    rotations: Mapping[str, KroneckerRotation],
    layers: list[dict[str, Any]],
    settings: QuantizationSettings,
    store: resume.WorkDir | None,
) -> Decoder:
    """Return the quantised model: blocks stacked on the host or left in files, all else shared with the original."""

    def stacked(name: str) -> Any:
        first = layers[0][name]
        if store is None or not isinstance(first, Absent):
            return np.stack([layer[name] for layer in layers])
        read = functools.partial(_read_packed, store, name)
        return StoredLayers(read, (len(layers), *first.shape), first.dtype)

    changes: dict[str, Any] = {}
    for site in model.sites:
        for name in site.linears:
            m, _ = getattr(model.blocks, name).features
            prefix = f"{name}.kernel."
            parts = {key.removeprefix(prefix): stacked(key) for key in layers[0] if key.startswith(prefix)}
            changes[f"{name}.kernel"] = quantizers.tensor(settings.weights, parts, m)
        clips = stacked(f"{site.name}.clips")
        changes |= input_changes(site, rotations.get(site.name), clips, settings.activations.bits)
    return replace(model, {f"blocks.{path}": value for path, value in changes.items()})
