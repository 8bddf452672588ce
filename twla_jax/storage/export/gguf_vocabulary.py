"""Writes a tokenizer as GGUF metadata: byte-level BPE, or sentencepiece's BPE with bytes to fall back on."""

import json
import logging
from typing import TYPE_CHECKING, Any, cast

import gguf

from twla_jax.errors import TwlaError
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.models.io.pre_tokenizers import PRE_TOKENIZERS
from twla_jax.models.io.tokenizer import as_json, tokenizer_from_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = gguf.TokenType
_GPT2 = PRE_TOKENIZERS["gpt-2"].patterns[0]
_MOST_ENDS = 3  # `eos`, `eot` and `eom`
_log = logging.getLogger(__name__)
_UNREACHED = -1e6  # score of pieces that no merge makes
# Words, digits, contractions, blanks and letters of several scripts: texts that vocabularies split differently.
PROBES = (
    "Hello world, it's 1234567 o'clock!  Two  blanks\n\n\ttabs\r\nend ",
    "def f(x):\n    return x**2 + 0.5e-3  # ÄÖü ß é",
    "Привет, мир. 你好，世界。 こんにちは 🙂 नमस्ते مرحبا",
)


def add_vocabulary(
    writer: gguf.GGUFWriter,
    tokenizer: "PreTrainedTokenizerBase | None",
    vocab_size: int,
    ends: tuple[int, ...],
) -> None:
    """Write the vocabulary, special tokens and chat template of a tokenizer; None writes that there is none.

    Args:
      writer: of the file.
      tokenizer: of the model; None for none.
      vocab_size: rows of the embedding; tokens beyond the tokenizer's are marked as unused.
      ends: tokens that end a text; the first three have a place, of others a warning says that they have none.

    Raises:
      TwlaError: GGUF has no form for a tokenizer of this kind.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    described = json.loads(as_json(tokenizer))
    model = described["model"]
    pieces: list[Any] = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [Kind.UNUSED] * vocab_size
    added = {token["id"]: token for token in described["added_tokens"]}
    vocabulary = model["vocab"] if isinstance(model.get("vocab"), dict) else {}
    for piece, index in [*vocabulary.items(), *((token["content"], index) for index, token in added.items())]:
        if index >= vocab_size:
            raise TwlaError(f"token {index} of the tokenizer has no row in the embedding of {vocab_size}")
        pieces[index], kinds[index] = piece, Kind.NORMAL
    for index, token in added.items():
        kinds[index] = Kind.CONTROL if token["special"] else Kind.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    if model["type"] != "BPE":
        raise TwlaError(f"GGUF has no form for the tokenizer ({model['type']}, not BPE); give --format hf")
    if _is_byte_level(described):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(described))
        writer.add_token_merges(merges)
    elif model.get("byte_fallback"):
        _add_sentencepiece(writer, described, pieces, kinds, merges)
    else:
        raise TwlaError("GGUF has no form for a BPE tokenizer without bytes; give --format hf")
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    _add_special(writer, tokenizer, ends)


def check_vocabulary(file: GgufFile, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a file whose tokenizer, read back, splits texts otherwise than the original.

    Raises:
      TwlaError: it does.
    """
    again = tokenizer_from_gguf(file)
    for text in PROBES:
        ids = (each(text, add_special_tokens=True)["input_ids"] for each in (again, tokenizer))
        if next(ids) != next(ids):
            raise TwlaError("the tokenizer would split texts otherwise in GGUF; give --format hf")


def _add_sentencepiece(writer, described, pieces, kinds, merges) -> None:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    unknown = described["model"].get("unk_token")
    for index, piece in enumerate(pieces):
        if len(piece) == 6 and piece.startswith("<0x") and kinds[index] == Kind.NORMAL:
            kinds[index] = Kind.BYTE
        elif piece == unknown:
            kinds[index] = Kind.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([float(-ranks[piece]) if piece in ranks else _UNREACHED for piece in pieces])
    writer.add_add_space_prefix(_adds_space(described))


def _add_special(
    writer: gguf.GGUFWriter, tokenizer: "PreTrainedTokenizerBase", ends: tuple[int, ...]
) -> None:
    if len(ends) > _MOST_ENDS:
        left_out = ", ".join(map(str, ends[_MOST_ENDS:]))
        _log.warning("GGUF has places for %d end tokens; left out: %s", _MOST_ENDS, left_out)
    bos, eos = cast(int | None, tokenizer.bos_token_id), cast(int | None, tokenizer.eos_token_id)
    for index, add in (
        (bos, writer.add_bos_token_id),
        (ends[0] if ends else eos, writer.add_eos_token_id),
        (ends[1] if len(ends) > 1 else None, writer.add_eot_token_id),
        (ends[2] if len(ends) > 2 else None, writer.add_eom_token_id),  # Llama 3 has three
        (cast(int | None, tokenizer.unk_token_id), writer.add_unk_token_id),
        (cast(int | None, tokenizer.pad_token_id), writer.add_pad_token_id),
    ):
        if index is not None:
            add(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bos is not None and ids[:1] == [bos])
    writer.add_add_eos_token(eos is not None and ids[-1:] == [eos])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer or normaliser, one after the other."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _is_byte_level(described: dict[str, Any]) -> bool:
    steps = _steps(described["pre_tokenizer"], "pretokenizers")
    return bool(steps) and steps[-1]["type"] == "ByteLevel" and not steps[-1]["add_prefix_space"]


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """Return llama.cpp's name for how text is split into words."""
    patterns = []
    for step in _steps(described["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex"))
        elif step["type"] == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif step["type"] == "ByteLevel":
            patterns += [_GPT2] if step["use_regex"] else []
        else:
            patterns.append(None)
    whole = bool(described["model"].get("ignore_merges"))
    alike = [name for name, each in PRE_TOKENIZERS.items() if list(each.patterns) == patterns]
    best = [name for name in alike if PRE_TOKENIZERS[name].ignores_merges == whole]
    if not best:
        raise TwlaError("GGUF has no name for how the tokenizer splits words; give --format hf")
    return best[0]


def _adds_space(described: dict[str, Any]) -> bool:
    normalizers = _steps(described["normalizer"], "normalizers")
    words = _steps(described["pre_tokenizer"], "pretokenizers")
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in words
    )
