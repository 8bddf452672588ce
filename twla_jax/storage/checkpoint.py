"""A quantised model as a folder that works alone: written whole or not at all, checked when it is read.

OUT/params/       orbax checkpoint: one uncompressed array a folder, codes at five trits a byte (integers without gaps)
OUT/tokenizer/    the tokenizer's own files
OUT/report.json   what was done, measured and spent
OUT/ila_amp.json  where bits were allocated: the sensitivity tables
OUT/twla.json     format, model configuration, recipe, every tensor's layout, every file's size and SHA-256
"""

import contextlib
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from twla_jax import json_text
from twla_jax.core.activation import ActivationQuantizer
from twla_jax.core.grouped_tensor import GroupedTensor
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.tensors import IntegerTensor, TernaryTensor
from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.io.tokenizer import load_tokenizer, save_tokenizer
from twla_jax.recipe import Recipe
from twla_jax.storage import folders, locks, places
from twla_jax.storage.codec import codec_of, pack_stored, unpack_stored
from twla_jax.storage.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    PARAMS,
    REPORT,
    TOKENIZER,
    array_name,
    checksum,
    read_config,
    read_manifest,
    read_report,
    unlisted,
    verify,
)
from twla_jax.version import __version__

# How a parameter that is no plain array is told apart in the manifest. Its static fields are kept there by name.
_KINDS: dict[str, type] = {
    "ternary": TernaryTensor,
    "integer": IntegerTensor,
    "grouped": GroupedTensor,
    "rotation": KroneckerRotation,
    "activation": ActivationQuantizer,
}
_ARRAY = "array"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
# Orbax reads none of these back. They hold the run's path, time and device, so that the same model gave other bytes.
_UNREAD = ("commit_success.txt", "_CHECKPOINT_METADATA", "_sharding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a folder says of itself beside the model; `tensors` is the layout that `accounting.py` reads."""

    recipe: Recipe
    report: dict[str, Any]
    config: DecoderConfig
    tensors: dict[str, Any]


def is_checkpoint(path: str | Path) -> bool:
    """Return whether a path is a folder that `save` wrote."""
    return (Path(path) / MANIFEST).is_file()


@contextlib.contextmanager
def claim(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Keep the place of a folder for the caller, from before hours of work until it is saved there.

    Returns:
      (as a context) the path to give to `save`; a link is followed.

    Raises:
      TwlaError: what `resolve_place`, `check_output` and `hold` refuse.
    """
    folder = places.resolve_place(out)
    with locks.hold(folder):
        check_output(folder, overwrite)
        yield folder


@contextlib.contextmanager
def claim_saved(out: str | Path) -> Iterator[Path]:
    """Keep a folder that `save` wrote for the caller, who changes it by `revise`.

    Returns:
      (as a context) its path; a link is followed.

    Raises:
      TwlaError: it holds no quantised model, or what `resolve_place` and `hold` refuse.
    """
    folder = places.resolve_place(out)
    if not folder.exists() and not locks.replaced_folder(folder):
        read_manifest(folder)  # refuses, without a trace of a lock
    with locks.hold(folder):
        read_manifest(folder)
        places.require_replaceable(folder)
        yield folder


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse a place that `save` would not write to; call it before hours of work.

    Raises:
      TwlaError: `folder` is a file or a mount point, or holds something and `overwrite` is off or what it holds is no
        quantised model.
    """
    folder = Path(folder)
    places.require_replaceable(folder)
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise TwlaError(f"{folder}: exists and is not empty; choose another folder or give --overwrite")
        if not is_checkpoint(folder):
            raise TwlaError(f"{folder}: holds no quantised model, so it is not overwritten")
        if others := _others(folder):
            raise TwlaError(f"{others[0]}: was not written by twla and would be lost; move it away first")


def _others(folder: Path) -> list[Path]:
    """Return the files of a quantised folder that were not saved with the model; none where it is damaged."""
    try:
        return unlisted(folder, read_manifest(folder))
    except TwlaError:
        return []


def save(
    model: Decoder,
    tokenizer: Any,
    folder: str | Path,
    recipe: Recipe,
    report: dict[str, Any],
    *,
    extra: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a quantised model beside `folder`, sync it to the disk and put it into place in one step.

    Codes go from 2 bits a weight to base 3, layer by layer (integers from a byte to their own bits); every other array
    is stored in the dtype it has.

    Args:
      model: quantised.
      tokenizer: what `models.io.tokenizer.load_tokenizer` returns; None leaves the folder without one.
      folder: to write.
      recipe: that made the model.
      report: JSON-ready figures, kept as `report.json`.
      extra: other files to keep in the folder, by name.
      overwrite: replace a quantised model that is there.

    Raises:
      TwlaError: what `claim` refuses, a name in `extra` that is not that of a file of its own in the folder, a report
        that JSON cannot hold, or a disk without room. The folder is then as it was before.
    """
    more = {REPORT: json_text.dumps(report), **_checked_extra(extra or {})}
    with claim(Path(os.path.abspath(places.expand(folder))), overwrite=overwrite) as folder:
        arrays, tensors = _to_stored(model)
        folders.require_room(folder, [array.nbytes for array in arrays.values()])
        with folders.beside(folder) as temporary:
            with _checkpointer() as checkpointer:
                checkpointer.save(temporary / PARAMS, arrays)
            for name in _UNREAD:
                (temporary / PARAMS / name).unlink(missing_ok=True)
            if tokenizer is not None:
                save_tokenizer(tokenizer, temporary / TOKENIZER)
            _write_files(temporary, more)
            _seal(temporary, model.config, recipe, tensors, {})


def revise(
    folder: str | Path, model: Decoder, recipe: Recipe, report: dict[str, Any], extra: Mapping[str, str]
) -> None:
    """Give a saved model the activation settings of `model`, and a new recipe and report.

    Its weights stay the files they are.

    The new folder is made beside the old one, from links to the files that stay, and renamed into place.

    Args:
      folder: that `save` wrote.
      model: what `load` gave for this folder, with other bits or clips.
      recipe: in place of the old one.
      report: in place of the old one.
      extra: other text files to keep in the folder, by name; those there before stay.

    Raises:
      TwlaError: no such model, or a disk without room. The folder is then as it was before.
    """
    with claim_saved(Path(os.path.abspath(places.expand(folder)))) as folder:
        _revise(folder, model, recipe, {REPORT: json_text.dumps(report), **_checked_extra(extra)})


def _revise(folder: Path, model: Decoder, recipe: Recipe, written: Mapping[str, str | bytes]) -> None:
    manifest = read_manifest(folder)
    activations, tensors = _to_stored(model, ActivationQuantizer)
    with folders.beside(folder) as temporary:
        kept = dict(manifest["files"])
        for name in written.keys() & kept.keys():
            del kept[name]
        others = {path.relative_to(folder).as_posix() for path in unlisted(folder, manifest)} - written.keys()
        for name in [*kept, *others]:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            folders.link(folder / name, temporary / name)
        for name, array in activations.items():
            # One uncompressed chunk, as `save` leaves it. A new file: the old one is the old folder's, too.
            chunk = Path(PARAMS, name, ".".join("0" * array.ndim))
            del kept[str(chunk)]
            (temporary / chunk).unlink()
            (temporary / chunk).write_bytes(jax.device_get(array).tobytes())
        _write_files(temporary, written)
        _seal(temporary, model.config, recipe, {**manifest["tensors"], **tensors}, kept, unsaved=others)


def load(
    folder: str | Path, mesh: jax.sharding.Mesh | None = None, dtype: Any = None
) -> tuple[Decoder, Any, CheckpointInfo]:
    """Read what `save` wrote, straight onto one device or onto a mesh.

    Args:
      folder: that `save` wrote.
      mesh: with axes `data` and `model`; every leaf lands in the sharding that `sharding.shardings` gives it.
      dtype: compute dtype of the model; None takes the decoder's default.

    Returns:
      `(model, tokenizer, info)`; the tokenizer is None where the folder has none.

    Raises:
      TwlaError: no such model, a newer format, or a file that is missing, cut short or changed.
    """
    folder = Path(os.path.abspath(folder))
    manifest = read_manifest(folder)
    verify(folder, manifest)
    config = read_config(manifest, str(folder / MANIFEST))
    settings = {} if dtype is None else {"dtype": dtype}
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **settings))
    _describe(model, manifest["tensors"], folder / MANIFEST)
    _restore(model, folder / PARAMS, manifest["tensors"], mesh)
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_dir() else None
    info = CheckpointInfo(
        recipe=Recipe.from_dict(manifest["recipe"], source=str(folder / MANIFEST)),
        report=read_report(folder),
        config=config,
        tensors=manifest["tensors"],
    )
    return model, tokenizer, info


def _to_stored(model: Decoder, only: type = object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays that go to disk by name, and the manifest's account of the parameters they make up."""
    arrays, tensors = {}, {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, value = ".".join(map(str, path)), variable.get_value()
        if not isinstance(value, only):
            continue
        kind = next((kind for kind, cls in _KINDS.items() if isinstance(value, cls)), _ARRAY)
        static, parts = {}, {"": value}
        if kind != _ARRAY:
            fields = dataclasses.fields(value)
            static = {
                field.name: getattr(value, field.name) for field in fields if field.metadata.get("static")
            }
            values = {field.name: getattr(value, field.name) for field in fields if field.name not in static}
            parts = {part: array for part, array in values.items() if array is not None}
        for part, array in parts.items():
            if codec := codec_of(kind, static, part):
                parts[part] = pack_stored(array, codec)
            arrays[array_name(name, part)] = parts[part]
        tensors[name] = {
            "kind": kind,
            "static": static,
            "arrays": {
                part: {"shape": list(a.shape), "dtype": jnp.dtype(a.dtype).name} for part, a in parts.items()
            },
        }
    return arrays, tensors


def _describe(model: Decoder, tensors: dict[str, Any], source: Path) -> None:
    """Put abstract parameters as the manifest describes them into an abstract model.

    Raises:
      TwlaError: a parameter that the model does not have or that is missing, or one of another size.
    """
    before = {
        ".".join(map(str, path)): variable.get_value().shape
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    if missing := before.keys() - tensors.keys():
        raise TwlaError(f"{source}: describes no {min(missing)}; the folder is damaged")
    for name, entry in tensors.items():
        try:
            value = _abstract(entry)
            _assign(model, name, value)
        except (AttributeError, TypeError, ValueError, KeyError):
            raise TwlaError(f"{source}: describes {name[:100]!r}, which is no part of the model") from None
        if name in before and sorted(before[name]) != sorted(value.shape):
            raise TwlaError(f"{source}: {name} is {list(value.shape)}, the model's {list(before[name])}")


def _abstract(entry: dict[str, Any]) -> Any:
    """Return a parameter of `jax.ShapeDtypeStruct`s as it will be in memory, codes at 2 bits."""
    parts = {
        part: jax.ShapeDtypeStruct(tuple(a["shape"]), jnp.dtype(a["dtype"]))
        for part, a in entry["arrays"].items()
    }
    if entry["kind"] == _ARRAY:
        return parts[""]
    for part, stored in parts.items():
        if codec := codec_of(entry["kind"], entry["static"], part):
            parts[part] = jax.ShapeDtypeStruct((*stored.shape[:-1], codec.width), stored.dtype)
    return _KINDS[entry["kind"]](**parts, **entry["static"])


def _restore(model: Decoder, params: Path, tensors: dict[str, Any], mesh: jax.sharding.Mesh | None) -> None:
    """Fill the abstract parameters of `model` from the orbax checkpoint."""
    state = nnx.state(model, nnx.Param)
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if mesh is None:
        placed = jax.tree.map(lambda _: single, state)
    else:
        from twla_jax.models.sharding import shardings

        placed = shardings(state, mesh)
    targets = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(placed)}
    wanted = {}
    for name, entry in tensors.items():
        for part, a in entry["arrays"].items():
            sharding = targets[name] if part == "" else getattr(targets[name], part)
            if codec_of(entry["kind"], entry["static"], part):
                sharding = _stored_sharding(a["shape"], mesh) or single
            wanted[array_name(name, part)] = jax.ShapeDtypeStruct(
                tuple(a["shape"]), jnp.dtype(a["dtype"]), sharding=sharding
            )
    with _checkpointer() as checkpointer:
        try:
            arrays = checkpointer.restore(
                params, item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
            )
        except (ValueError, TypeError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TwlaError(f"{params}: cannot be read as {MANIFEST} describes it ({reason})") from None
    for name, entry in tensors.items():
        parts = {part: arrays.pop(array_name(name, part)) for part in entry["arrays"]}
        for part, stored in parts.items():
            if codec := codec_of(entry["kind"], entry["static"], part):
                placed = getattr(targets[name], part)
                parts[part] = jax.jit(unpack_stored, static_argnums=1, out_shardings=placed)(stored, codec)
        value = parts[""] if entry["kind"] == _ARRAY else _KINDS[entry["kind"]](**parts, **entry["static"])
        _assign(model, name, value)


def _stored_sharding(shape: list[int], mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding | None:
    """Return rows over `model` where they divide: bytes of five trits cannot be cut where 2-bit tiles are, rows can."""
    if mesh is None:
        return None
    divides = shape[-2] % mesh.shape["model"] == 0
    spec = [None] * (len(shape) - 2) + ["model" if divides else None, None]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def _assign(model: Decoder, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    module = functools.reduce(getattr, parents, model)
    # nnx.data: a rotation may land where the full-precision model has None
    setattr(module, last, nnx.data(nnx.Param(value)))


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.PyTreeCheckpointer]:
    """Yield a checkpointer that writes one uncompressed file an array: the disk then holds what the accounting says.

    Orbax's log is held back: it would print every thread's traceback of the one error that is raised, too.
    """
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=False, use_compression=False) as checkpointer:
            yield checkpointer
    finally:
        log.setLevel(level)


def _checked_extra(extra: Mapping[str, str | bytes]) -> Mapping[str, str | bytes]:
    """Return the files as they are, if each has a name of its own in the folder and content that can be written.

    Raises:
      TwlaError: another folder's name, one of the files that `save` itself writes, or a content that is no text.
    """
    taken = {MANIFEST, REPORT, PARAMS, TOKENIZER}
    for name, content in extra.items():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or name.lower() in taken:
            raise TwlaError(
                f"extra file {name!r}: must be the plain name of a file, and none of {sorted(taken)}"
            )
        if not isinstance(content, str | bytes):
            raise TwlaError(f"extra file '{name}': must be text or bytes, not {type(content).__name__}")
    return extra


def _write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _seal(
    folder: Path,
    config: DecoderConfig,
    recipe: Recipe,
    tensors: dict[str, Any],
    known: dict[str, Any],
    unsaved: Collection[str] = (),
) -> None:
    """Write the manifest, once every other file is on the disk; those in `known` are there already.

    Files in `unsaved`, which a user put there, are not listed.
    """
    names = (path.relative_to(folder).as_posix() for path in folders.files(folder))
    names = [name for name in names if name not in unsaved]
    manifest = {
        "format_version": FORMAT_VERSION,
        "twla_jax": __version__,
        "config": config.to_dict(),
        "recipe": recipe.to_dict(),
        "tensors": tensors,
        "files": {name: known.get(name) or folders.fingerprint(folder / name, sync=True) for name in names},
    }
    manifest["checksum"] = checksum(manifest)
    (folder / MANIFEST).write_text(json_text.dumps(manifest))
    folders.fingerprint(folder / MANIFEST, sync=True)
