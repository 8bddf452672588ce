"""From a quantised folder to a folder or file of another format."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.jobs.loading import kept_files
from twla_jax.models import sites
from twla_jax.storage import checkpoint, folders, places
from twla_jax.storage.export import huggingface, packed

Format = Literal["hf", "safetensors"]
Dtype = Literal["bfloat16", "float16", "float32"]


def export_model(
    out: str | Path, dest: str | Path, *, format: Format, dtype: Dtype | None = None
) -> dict[str, Any]:
    """Writes a quantised model in another format, whole or not at all.

    Args:
      out: folder that `twla quantize` wrote.
      dest: folder to write; it must not exist, or be empty.
      format: `hf`, dequantised, rotations folded back; `safetensors`, this library's packed arrays in one file.
      dtype: of the weights in `hf`; bfloat16 if None.
    Returns:
      What was written: `format`, `dest`, `files` (bytes by name), `bytes`, `activation_bits` (of the quantised model;
      formats without this library's quantiser leave activations at 16).
    Raises:
      TwlaError: `out` holds no quantised model, `dest` is taken, or the format cannot hold the model.
    """
    if dtype is not None and format != "hf":
        raise TwlaError(f"--dtype is for --format hf; {format} keeps the types that the model has")
    out, folder = Path(places.expand(out)), places.resolve_place(dest)
    checkpoint.read_manifest(out)
    places.require_replaceable(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise TwlaError(f"{dest}: exists and is not empty; choose another folder")
    model, tokenizer, info = checkpoint.load(out)
    files = {name: _bytes(content) for name, content in kept_files(out).items()}
    with folders.beside(folder) as temporary:
        if format == "hf":
            huggingface.write(model, tokenizer, temporary, dtype=dtype or "bfloat16", files=files)
        else:
            packed.write(out, info, temporary)
            huggingface.write_settings(temporary, None, tokenizer, files)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folders.files(folder)}
    return {
        "format": format,
        "dest": str(dest),
        "files": sizes,
        "bytes": sum(sizes.values()),
        "activation_bits": float(np.mean(sites.input_bits(model))),
    }


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content
