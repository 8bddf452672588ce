"""Reads a model, its settings or its tokenizer, whatever file it comes in."""

from pathlib import Path
from typing import TYPE_CHECKING

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.io import gguf, huggingface
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.models.io.tokenizer import load_tokenizer, tokenizer_from_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_model(
    path: str | Path, dtype=None, *, in_files: bool = False
) -> tuple[Decoder, "PreTrainedTokenizerBase"]:
    """Return a model and its tokenizer from a Hugging Face folder or a GGUF file.

    The settings are checked first, then the tokenizer, and only then are weights read. Parameters are numpy arrays
    on the host, in the type they are stored in; move them with `jax.device_put`.

    Args:
      path: of a Hugging Face folder or a GGUF file.
      dtype: what the model computes in: float32 (also if None), bfloat16 or float16.
      in_files: leave the blocks' matrices in their files, where each layer is read when it is asked for: see
        `StoredLayers`. For models that are larger than the memory.

    Raises:
      TwlaError: the path is neither, the architecture is not supported, or a file is missing or damaged.
    """
    path = _existing(path)
    if path.is_dir():
        huggingface.read_config(path)
        tokenizer = load_tokenizer(path)
        return huggingface.load_model(path, dtype=dtype, in_files=in_files), tokenizer
    file = GgufFile(path)
    gguf.read_config(file)
    tokenizer = tokenizer_from_gguf(file)
    return gguf.load_model(file, dtype=dtype, in_files=in_files), tokenizer


def load_model(path: str | Path, dtype=None) -> Decoder:
    """Return what `read_model` does, without the tokenizer."""
    path = _existing(path)
    if path.is_dir():
        return huggingface.load_model(path, dtype=dtype)
    return gguf.load_model(GgufFile(path), dtype=dtype)


def read_config(path: str | Path) -> DecoderConfig:
    """Return a model's settings alone; no weight is touched. Raises as `read_model`."""
    path = _existing(path)
    return huggingface.read_config(path) if path.is_dir() else gguf.read_config(GgufFile(path))


def _existing(path: str | Path) -> Path:
    path = Path(path)
    try:
        found = path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise TwlaError(f"{path}: cannot be read ({error.strerror})") from error
    if not found:
        raise TwlaError(f"{path}: no such file or folder")
    return path
