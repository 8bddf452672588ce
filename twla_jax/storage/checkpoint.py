"""Saves a quantised model as a folder that works alone: written whole or not at all, checked when it is read.

OUT/params/       orbax checkpoint: one uncompressed array a folder, codes at five trits a byte (integers without gaps)
OUT/tokenizer/    the tokenizer's own files
OUT/report.json   what was done, measured and spent
OUT/ila_amp.json  where bits were allocated: the sensitivity tables
OUT/generation_config.json  the original's, if it had one
OUT/self_calibration.npy    the text that the model sampled itself, where it was calibrated on that
OUT/twla.json     format, model configuration, recipe, every tensor's layout, every file's size and SHA-256
"""

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from twla_jax import json_text
from twla_jax.core.activation import ActivationQuantizer
from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.io.tokenizer import load_tokenizer, save_tokenizer
from twla_jax.recipe import Recipe
from twla_jax.storage import folders, parameters, places
from twla_jax.storage.claims import claim, claim_saved
from twla_jax.storage.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    PARAMS,
    REPORT,
    TOKENIZER,
    checksum,
    is_checkpoint,
    read_config,
    read_manifest,
    read_report,
    unlisted,
    verify,
)
from twla_jax.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With what is read of a folder without its model, so that a reader needs one module.
__all__ = [
    "FORMAT_VERSION",
    "REPORT",
    "CheckpointInfo",
    "checksum",
    "claim",
    "claim_saved",
    "is_checkpoint",
    "load",
    "read_manifest",
    "read_report",
    "revise",
    "save",
    "verify",
]

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a folder says of itself beside the model; `tensors` is the layout that `accounting.py` reads."""

    recipe: Recipe
    report: dict[str, Any]
    config: DecoderConfig
    tensors: dict[str, Any]


def save(
    model: Decoder,
    tokenizer: "PreTrainedTokenizerBase | None",
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
        arrays, tensors = parameters.to_stored(model)
        folders.require_room(folder, [array.nbytes for array in arrays.values()])
        with folders.beside(folder) as temporary:
            parameters.write(temporary / PARAMS, arrays)
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
    activations, tensors = parameters.to_stored(model, ActivationQuantizer)
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
    folder: str | Path, mesh: jax.sharding.Mesh | None = None, dtype: DTypeLike | None = None
) -> "tuple[Decoder, PreTrainedTokenizerBase | None, CheckpointInfo]":
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
    parameters.describe(model, manifest["tensors"], folder / MANIFEST)
    parameters.restore(model, folder / PARAMS, manifest["tensors"], mesh)
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_dir() else None
    info = CheckpointInfo(
        recipe=Recipe.from_dict(manifest["recipe"], source=str(folder / MANIFEST)),
        report=read_report(folder),
        config=config,
        tensors=manifest["tensors"],
    )
    return model, tokenizer, info


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
