"""Turns a quantised folder into a folder or file of another format."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.jobs.loading import kept_files
from twla_jax.models import sites
from twla_jax.storage import checkpoint, folders, locks, places, whole_files
from twla_jax.storage.export import compressed_tensors, gguf_file, hqq, huggingface, packed

Format = Literal["hf", "gguf", "compressed-tensors", "hqq", "safetensors"]
Dtype = Literal["bfloat16", "float16", "float32"]
GgufType = Literal["f16", "q2_0", "tq2_0"]


def export_model(
    out: str | Path,
    dest: str | Path,
    *,
    format: Format,
    dtype: Dtype | None = None,
    gguf_type: GgufType | None = None,
) -> dict[str, Any]:
    """Write a quantised model in another format, whole or not at all.

    Args:
      out: folder that `twla quantize` wrote.
      dest: what to write, where there is nothing yet: a folder, or for `gguf` a file.
      format: `hf`, dequantised, rotations folded back; `gguf`, the same in float16 or ternary; `compressed-tensors`,
        packed 2-bit integers; `hqq`, these with zero points; `safetensors`, this library's packed
        arrays in one file.
      dtype: of the weights in `hf`; bfloat16 if None.
      gguf_type: of the linears in `gguf`; f16 if None.
    Returns:
      What was written: `format`, `dest`, `files` (bytes by name), `bytes`, `activation_bits` (of the quantised model;
      only `safetensors` keeps the quantiser of activations).
    Raises:
      TwlaError: `out` holds no quantised model, `dest` is taken, or the format cannot hold the model.
    """
    if dtype is not None and format != "hf":
        raise TwlaError(f"--dtype is for --format hf; {format} has types of its own")
    if gguf_type is not None and format != "gguf":
        raise TwlaError(f"--type is for --format gguf, not {format}")
    out, place = Path(places.expand(out)), places.resolve_place(dest)
    checkpoint.read_manifest(out)
    if place.absolute().resolve().is_relative_to(out.resolve()):
        raise TwlaError(f"{dest}: lies in {out} itself; name a place outside")
    # Kept from before the model is read until the new files are in place, so that what is free stays so.
    with locks.hold(place):
        _require_free(place, dest, format)
        sizes, bits = _write(out, place, format, dtype or "bfloat16", gguf_type or "f16")
    return {
        "format": format,
        "dest": str(dest),
        "files": sizes,
        "bytes": sum(sizes.values()),
        "activation_bits": bits,
    }


def _write(
    out: Path, place: Path, format: Format, dtype: Dtype, gguf_type: GgufType
) -> tuple[dict[str, int], float]:
    """Write the files, and return their bytes by name and the mean bits of activations."""
    model, tokenizer, info = checkpoint.load(out)
    bits = float(np.mean(sites.input_bits(model)))
    if format == "gguf":
        with whole_files.beside(place) as temporary:
            gguf_file.write(model, tokenizer, temporary, kind=gguf_type)
        return {place.name: place.stat().st_size}, bits
    files = {name: _bytes(content) for name, content in kept_files(out).items()}
    with folders.beside(place) as temporary:
        if format == "hf":
            huggingface.write(model, tokenizer, temporary, dtype=dtype, files=files)
        elif format == "compressed-tensors":
            compressed_tensors.write(model, tokenizer, temporary, files=files)
        elif format == "hqq":
            hqq.write(model, tokenizer, temporary, files=files)
        else:
            packed.write(out, info, temporary)
            huggingface.write_settings(temporary, None, tokenizer, files)
    return {str(path.relative_to(place)): path.stat().st_size for path in folders.files(place)}, bits


def _require_free(place: Path, dest: str | Path, format: Format) -> None:
    if format == "gguf":
        if place.exists():
            raise TwlaError(f"{dest}: exists; gguf is one file, name one that does not exist, DEST.gguf")
        return
    places.require_replaceable(place)
    if place.is_dir() and any(place.iterdir()):
        raise TwlaError(f"{dest}: exists and is not empty; choose another folder")


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content
