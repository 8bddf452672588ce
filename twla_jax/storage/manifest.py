"""Reads the file that describes a quantised folder: written last, and checked in all its parts before it is used."""

import hashlib
import json
import math
import os
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp

from twla_jax import json_files, schema
from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.storage import folders, locks

FORMAT_VERSION = 1
MANIFEST = "twla.json"
REPORT = "report.json"
PARAMS = "params"
TOKENIZER = "tokenizer"
KINDS = ("array", "ternary", "integer", "grouped", "rotation", "activation")

_COUNT = schema.integer(0, 2**48)
_DTYPES = ("float32", "float16", "bfloat16", "uint8", "int8", "int32")
# How zarr files name these.
_ZARR = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "bfloat16",
    "uint8": "|u1",
    "int8": "|i1",
    "int32": "<i4",
}
_ARRAY = schema.record(shape=schema.sequence(_COUNT, longest=5), dtype=schema.one_of(*_DTYPES))
_STATIC = schema.either(schema.boolean(), schema.integer(0, 2**31), schema.optional(schema.text(100)))
_TENSOR = schema.record(
    kind=schema.one_of(*KINDS),
    static=schema.mapping(_STATIC, longest=20),
    arrays=schema.mapping(_ARRAY, longest=20),
)
_FILE = schema.record(bytes=_COUNT, sha256=schema.text(64))
_FIELDS = {
    "format_version": _COUNT,
    "twla_jax": schema.text(100),
    "config": schema.mapping(longest=200),
    "recipe": schema.mapping(longest=200),
    "tensors": schema.mapping(_TENSOR, longest=10**5),
    "files": schema.mapping(_FILE, longest=10**6),
    "checksum": schema.text(64),
}


def is_checkpoint(path: str | Path) -> bool:
    """Return whether a path is a folder that `save` wrote."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the contents of a folder's `twla.json`; reads no array.

    Raises:
      TwlaError: no such file, one that was changed or cut short, a format this version does not know, or a description
        whose parts do not fit together.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        old = locks.replaced_folder(Path(folder))
        hint = f"; {old} holds what was there before its replacement was cut short" if old else ""
        raise TwlaError(f"{folder}: not a quantised model (no {MANIFEST}){hint}")
    try:
        manifest = json_files.read_json(path)
        intact = manifest.get("checksum") == checksum(manifest)
    except (TwlaError, ValueError, RecursionError):
        intact, manifest = False, {}
    if not intact:
        raise TwlaError(f"{path}: cut short or changed; the folder is damaged")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise TwlaError(f"{path}: format {schema.shown(version)}, but this version reads {FORMAT_VERSION}")
    for key, check in _FIELDS.items():
        if not check.accepts(manifest.get(key)):
            raise TwlaError(f"{path}: {key} is not what this version writes; the folder is damaged")
    _check_names(path, manifest)
    _check_tensors(path, manifest)
    return manifest


def read_config(manifest: dict[str, Any], source: str) -> DecoderConfig:
    """Return the model's configuration.

    Raises:
      TwlaError: it is none that this version writes; the message begins with `source`.
    """
    try:
        return DecoderConfig.from_dict(manifest["config"]).checked(source)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TwlaError(f"{source}: config is not what this version writes ({error})") from None


def read_report(folder: str | Path) -> dict[str, Any]:
    """Return the contents of a folder's `report.json`.

    Raises:
      TwlaError: there is none, or it is damaged.
    """
    return json_files.read_json(Path(folder) / REPORT)


def verify(folder: str | Path, manifest: dict[str, Any], *, sizes_alone: bool = False) -> int:
    """Compare every file with the manifest, and return their bytes.

    Args:
      folder: that `save` wrote.
      manifest: from `read_manifest`.
      sizes_alone: reads no file; what was changed without changing its size is not found.

    Raises:
      TwlaError: a file that is missing, was changed, or would be read although the manifest does not list it.
    """
    folder, listed = Path(folder), manifest["files"]
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            raise TwlaError(f"{path}: missing; the folder is damaged")
        changed = path.stat().st_size != expected["bytes"]
        if changed or not (sizes_alone or folders.fingerprint(path) == expected):
            raise TwlaError(f"{path}: differs from what was saved; the folder is damaged")
    for path in unlisted(folder, manifest):
        if _is_read(path.relative_to(folder)):
            raise TwlaError(f"{path}: was not saved with the model, but would be read; remove it")
    if not sizes_alone:
        _check_stored(folder, manifest)
    return sum(file["bytes"] for file in listed.values())


def unlisted(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """Return the files below a folder that its manifest does not list, but for the manifest itself."""
    known = {MANIFEST, *manifest["files"]}
    found = []
    for inside, folders_there, names in os.walk(folder):
        begin = inside[len(str(folder)) :].strip(os.sep)
        links = [name for name in folders_there if os.path.islink(os.path.join(inside, name))]
        found += [f"{begin}{os.sep}{name}" if begin else name for name in (*names, *links)]
    return sorted(folder / name for name in found if name not in known)


def checksum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _is_read(name: Path) -> bool:
    """Return whether this library reads a file of this name, in a folder it wrote."""
    return name.parts[0] in (PARAMS, TOKENIZER) or (len(name.parts) == 1 and name.suffix in (".json", ".npy"))


def _check_names(path: Path, manifest: dict[str, Any]) -> None:
    for name in manifest["files"]:
        parts = PurePosixPath(name).parts
        inside = parts and ".." not in parts and not PurePosixPath(name).is_absolute()
        if not inside or "/".join(parts) != name or "\0" in name or "\\" in name or name == MANIFEST:
            raise TwlaError(f"{path}: lists the file {schema.shown(name)}, which lies in no such folder")
    if REPORT not in manifest["files"]:
        raise TwlaError(f"{path}: lists no {REPORT}; the folder is damaged")


def _check_tensors(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse tensors whose arrays do not fit the configuration, one another, or the sizes of their files."""
    config = read_config(manifest, str(path))
    stored: dict[str, int] = {}
    for name, file in manifest["files"].items():
        parts = name.split("/")
        if parts[0] == PARAMS and len(parts) == 3 and parts[2].replace(".", "").isdigit():
            stored[parts[1]] = stored.get(parts[1], 0) + file["bytes"]
    for name, entry in manifest["tensors"].items():
        for part, array in entry["arrays"].items():
            wanted = math.prod(array["shape"]) * jnp.dtype(array["dtype"]).itemsize
            if stored.get(array_name(name, part)) != wanted:
                raise TwlaError(f"{path}: {array_name(name, part)} does not have the bytes of its shape")
            if name.startswith("blocks.") and array["shape"][:1] != [config.num_layers]:
                raise TwlaError(f"{path}: {array_name(name, part)} is not of {config.num_layers} layers")
        if not _fits(entry):
            raise TwlaError(f"{path}: the arrays of {schema.shown(name)} do not fit together")


def _fits(entry: dict[str, Any]) -> bool:
    """Return whether the arrays of a tensor have the shapes that its kind has on the disk."""
    kind, static = entry["kind"], entry["static"]
    shapes = {part: tuple(array["shape"]) for part, array in entry["arrays"].items()}
    if kind == "array":
        return shapes.keys() == {""}
    if kind == "rotation":
        sides = [shapes.get(side, ()) for side in ("left", "right")]
        return len(shapes) == 2 and all(len(side) >= 2 and side[-1] == side[-2] for side in sides)
    if kind == "activation":
        bits = shapes.get("bits")
        return (
            bits is not None and shapes.get("clips") == (*bits, 4) and isinstance(static.get("enabled"), bool)
        )
    columns, group = static.get("in_features"), static.get("group_size")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in (columns, group)):
        return False
    groups = -(-columns // group)
    if kind == "grouped":
        return _fits_groups(shapes, columns, groups, static.get("salient_width"))
    if kind == "ternary":
        residual = shapes.keys() & {"residual_codes", "residual_ratio"}
        if shapes.keys() - residual - {"mu"} != {"codes", "alpha"} or len(residual) == 1:
            return False
        widths = {"codes": -(-columns // 5), "residual_codes": -(-columns // 5)}
    else:
        bits = static.get("bits")
        if shapes.keys() != {"codes", "scale", "zero_point"}:
            return False
        if not isinstance(bits, int) or not 2 <= bits <= 8:
            return False
        widths = {"codes": -(-columns * bits // 8), "zero_point": -(-groups * bits // 8)}
    rows = shapes["codes"][:-1]
    return bool(rows) and all(shape == (*rows, widths.get(part, groups)) for part, shape in shapes.items())


def _fits_groups(shapes: dict[str, tuple[int, ...]], columns: int, groups: int, salient: Any) -> bool:
    """Return whether the arrays of the published layout fit together: see `core.grouped_tensor`."""
    if not isinstance(salient, int) or not 1 <= salient <= columns:
        return False
    rows, bits = shapes.get("codes", (0, 0))[:-1], -(-columns // 8)
    return shapes == {
        "codes": (*rows, -(-columns // 5)),
        "residual_codes": (*rows, -(-salient // 5)),
        "large": (*rows, bits),
        "salient": (*rows[:-1], bits),
        "scales": (*rows, groups, 10),
    }


def _check_stored(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse arrays that their own files describe otherwise, as of another type of as many bytes."""
    for name, entry in manifest["tensors"].items():
        for part, array in entry["arrays"].items():
            inside = f"{PARAMS}/{array_name(name, part)}/.zarray"
            path = folder / inside
            if inside not in manifest["files"]:
                raise TwlaError(f"{path}: not listed in {MANIFEST}; the folder is damaged")
            own = json_files.read_json(path)
            plain = not own.get("compressor") and not own.get("filters") and own.get("order") == "C"
            if not plain or own.get("shape") != array["shape"] or own.get("dtype") != _ZARR[array["dtype"]]:
                raise TwlaError(f"{path}: describes another array than {MANIFEST}; the folder is damaged")


def array_name(tensor: str, part: str) -> str:
    """Return the name under which a part of a tensor is stored."""
    return f"{tensor}.{part}" if part else tensor
