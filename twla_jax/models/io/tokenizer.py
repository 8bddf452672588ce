"""Tokenizers: from a Hugging Face folder or a GGUF file, and into a folder that works offline."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from twla_jax.errors import TwlaError
from twla_jax.models.io.gguf_file import GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers takes seconds to import, hence inside the functions; that PyTorch is absent needs no warning.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder (as `save_tokenizer` or Hugging Face left it) or in a GGUF file; nothing is downloaded.

    Raises:
      TwlaError: there is none, or it cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return tokenizer_from_gguf(GgufFile(path))
    from transformers import AutoTokenizer

    if not (path / "tokenizer.json").exists() and not (path / "tokenizer_config.json").exists():
        raise TwlaError(f"{path}: no tokenizer is there (tokenizer.json)")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exception, too, for a broken file
        raise TwlaError(f"{path}: the tokenizer cannot be read ({_one_line(error)})") from error


def tokenizer_from_gguf(file: GgufFile) -> "PreTrainedTokenizerBase":
    """The tokenizer that a GGUF file's metadata describes, chat template included.

    Raises:
      TwlaError: the metadata is missing or of a kind transformers does not know.
    """
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    keys = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    described = {name: file.get(f"tokenizer.{key}") for key, name in keys.items()}
    described = {name: value for name, value in described.items() if value is not None}
    tokens = file.require("tokenizer.ggml.tokens")
    try:
        backend, _ = mapping.convert_gguf_tokenizer(file.require("general.architecture"), described)
    except (ValueError, KeyError) as error:
        raise TwlaError(f"{file.path}: its tokenizer cannot be read ({_one_line(error)})") from error
    if described.get("pre_tokenizer_type") == "smollm":
        # transformers takes GPT-2's split here; this vocabulary was learned with single digits.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{name}_token": file.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: tokens[i] for name, i in ids.items() if i is not None},
        # Sentencepiece vocabularies begin with BOS unless the file says otherwise.
        add_bos_token=file.get("tokenizer.ggml.add_bos_token", described.get("tokenizer_type") == "llama"),
        add_eos_token=file.get("tokenizer.ggml.add_eos_token", False),
        chat_template=file.get("tokenizer.chat_template"),
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> None:
    """Writes what `load_tokenizer` needs into `folder`, chat template included."""
    tokenizer.save_pretrained(folder)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
