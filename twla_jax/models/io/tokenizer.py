"""Loads tokenizers from a Hugging Face folder or a GGUF file, and saves them into a folder that works offline."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from twla_jax.errors import TwlaError
from twla_jax.json_files import read_json, require_file
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.models.io.pre_tokenizers import PRE_TOKENIZERS
from twla_jax.models.io.sentencepiece_file import as_one_line, from_sentencepiece, join_words
from twla_jax.schema import boolean, check_values, integer, number, sequence, shown, text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# transformers takes seconds to import, hence inside the functions; that PyTorch is absent needs no warning.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers → GGUF
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # where the file does not say
_MOST = 2**26  # entries of a vocabulary
_GGUF_CHECKS = {
    "tokenizer.ggml.model": text(),
    "tokenizer.ggml.pre": text(),
    "tokenizer.ggml.tokens": sequence(text(2**20), longest=_MOST, shortest=1),
    "tokenizer.ggml.scores": sequence(number(-1e30, 1e30), longest=_MOST),
    "tokenizer.ggml.token_type": sequence(integer(0, 255), longest=_MOST),
    "tokenizer.ggml.merges": sequence(text(2**20), longest=_MOST),
    "tokenizer.ggml.add_bos_token": boolean(),
    "tokenizer.ggml.add_eos_token": boolean(),
    "tokenizer.ggml.add_space_prefix": boolean(),
    "tokenizer.chat_template": text(2**24),
}


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer in a folder (as `save_tokenizer` or Hugging Face left it) or in a GGUF file.

    A folder's tokenizer.json is used as it is, whatever class its configuration names. Nothing is downloaded, and no
    code of the folder is run.

    Raises:
      TwlaError: there is none, or it cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return tokenizer_from_gguf(GgufFile(path))
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        if (path / name).exists():
            require_file(path / name)
    if (path / "tokenizer_config.json").exists():
        read_json(path / "tokenizer_config.json")
    if (path / "tokenizer.json").exists():
        return _from_json(path)
    return _from_older_files(path)


def _from_json(folder: Path) -> "PreTrainedTokenizerBase":
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    with as_one_line(folder):
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.encode(
            "\u2603 \U0010ffff"
        )  # what it cannot spell may raise, and would in the midst of a text
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        # transformers may have put its own post-processor or more tokens into it.
        if backend.post_processor is not None and tokenizer.backend_tokenizer.to_str() != backend.to_str():
            tokenizer._tokenizer = backend
        return tokenizer


def _from_older_files(folder: Path) -> "PreTrainedTokenizerBase":
    """Return a tokenizer from sentencepiece's own file, or from lists of words and merges."""
    if (folder / "tokenizer.model").exists():
        return from_sentencepiece(folder)
    if not (folder / "tokenizer_config.json").exists():
        raise TwlaError(f"{folder}: no tokenizer is there (tokenizer.json)")
    from transformers import AutoTokenizer

    with as_one_line(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def tokenizer_from_gguf(file: GgufFile) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that a GGUF file's metadata describes, chat template included.

    Words, spaces and BOS are as in llama.cpp: byte-level vocabularies by the name of their pre-tokenizer,
    sentencepiece ones with BOS and a space in front unless the file says otherwise.

    Raises:
      TwlaError: the metadata is missing, of a wrong type, or of a kind that is not known.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    _check_metadata(file)
    tokens, kind = file.require("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        raise TwlaError(
            f"{file.path}: its tokenizer cannot be read ({shown(kind)}; supported are 'llama' and 'gpt2')"
        )
    file.require(f"tokenizer.ggml.{'merges' if kind == 'gpt2' else 'scores'}")
    pre = PRE_TOKENIZERS.get(file.get("tokenizer.ggml.pre", "default"))
    if kind == "gpt2" and pre is None:
        raise TwlaError(f"{file.path}: pre-tokenizer {shown(file.get('tokenizer.ggml.pre'))} is not known")
    keys = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    described = {name: file.get(f"tokenizer.{key}") for key, name in keys.items()}
    described = {name: value for name, value in described.items() if value is not None}
    described.pop("pre_tokenizer_type", None)
    with as_one_line(file.path):
        backend, _ = mapping.convert_gguf_tokenizer(file.require("general.architecture"), described)
        if pre is not None and kind == "gpt2":
            _split_words(backend, pre.patterns)
            backend.model.ignore_merges = pre.ignores_merges
        else:
            join_words(backend, prefixed=file.get("tokenizer.ggml.add_space_prefix", True))
        ids = {name: file.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
        if kind == "llama":
            ids = {name: _SENTENCEPIECE_IDS.get(name) if i is None else i for name, i in ids.items()}
        begins = kind == "llama" or (pre is not None and pre.adds_bos)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)},
            add_bos_token=file.get("tokenizer.ggml.add_bos_token", begins and ids["bos"] is not None),
            add_eos_token=file.get("tokenizer.ggml.add_eos_token", False),
            chat_template=file.get("tokenizer.chat_template"),
        )


def _check_metadata(file: GgufFile) -> None:
    tokens = file.get("tokenizer.ggml.tokens", [])
    ids = {
        f"tokenizer.ggml.{key}_token_id": integer(0, 2**32 - 1) for key in (*_SPECIAL.values(), "eot", "eom")
    }
    check_values(file.metadata, {**_GGUF_CHECKS, **ids}, str(file.path))
    for key in ("scores", "token_type"):
        values = file.get(f"tokenizer.ggml.{key}")
        if values is not None and len(values) != len(tokens):
            raise TwlaError(f"{file.path}: {len(values)} {key} for a vocabulary of {len(tokens)}")
    for merge in file.get("tokenizer.ggml.merges", []):
        if merge.count(" ") != 1:
            raise TwlaError(f"{file.path}: merge {shown(merge)} is not a pair")


def _split_words(backend: "Tokenizer", patterns: tuple[str, ...]) -> None:
    from tokenizers import Regex, pre_tokenizers

    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, into_bytes])  # pyright: ignore[reportAttributeAccessIssue]


def as_json(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return all that decides how a tokenizer splits text, as the package tokenizers writes it."""
    return cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer.to_str()


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> None:
    """Write what `load_tokenizer` needs into `folder`, chat template included."""
    tokenizer.save_pretrained(folder)
