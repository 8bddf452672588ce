"""Reads sentencepiece's own file, `tokenizer.model`: into a tokenizer that gives the same pieces, or not at all."""

import importlib.util
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twla_jax.errors import TwlaError
from twla_jax.json_files import read_json
from twla_jax.schema import boolean, check_values

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_UNIGRAM, _BPE = 1, 2
_SAMPLES = (
    "The year 2024 had 12,345 words.",
    "  two  leading",
    "naïve café 中文字 😀",
    "tab\tx\n\nend ",
    "ﬁne ①",
    " \n = a \n b ",
    "",
    " ",
    "a\u00a0b\u3000c\u200bd e\u0301 Ⅷ ﷺ ½",
)
_RANDOM_SAMPLES = 64  # texts of pieces of the vocabulary, in any order


def from_sentencepiece(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer in `tokenizer.model`, once it gives the same pieces as sentencepiece itself.

    Args:
      folder: with that file, and perhaps a `tokenizer_config.json`.

    Raises:
      TwlaError: the package is missing, the file is damaged, or of a kind that is not converted exactly.
    """
    path = folder / "tokenizer.model"
    if importlib.util.find_spec("sentencepiece") is None:
        raise TwlaError(f"{path}: needs sentencepiece: pip install 'twla-jax[sentencepiece]'")
    stated = (
        read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    )
    check_values(stated, {"add_bos_token": boolean(), "add_eos_token": boolean()}, str(folder))
    with as_one_line(path):
        return _converted(path, stated)


def join_words(
    backend: "Tokenizer", *, prefixed: bool, before: tuple[Any, ...] = (), one_space: bool = False
) -> None:
    """Have sentencepiece's pieces cross words: a space is `▁`, and where asked for, another one begins each text.

    Args:
      backend: changed in place.
      prefixed: whether a text begins with a space.
      before: normalizers that come first.
      one_space: several spaces are one, and those around the text none.
    """
    from tokenizers import Regex, decoders, normalizers

    spaces = normalizers.Replace(" ", "▁")
    begin = [normalizers.Prepend("▁")] if prefixed else []
    narrow = [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    parts = [*before, *(narrow if one_space else []), *begin, spaces]
    backend.normalizer = normalizers.Sequence(parts)  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]
    strip = [decoders.Strip(content=" ", left=1)] if prefixed else []
    ends: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(ends)  # pyright: ignore[reportAttributeAccessIssue]


def _converted(path: Path, stated: Mapping[str, Any]) -> "PreTrainedTokenizerBase":
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, normalizers
    from transformers import PreTrainedTokenizerFast

    model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
    described: Any = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    trained, rules = described.trainer_spec, described.normalizer_spec
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    fixed = [i for i, piece in enumerate(described.pieces) if piece.type == piece.USER_DEFINED]
    if trained.model_type == _UNIGRAM:
        backend = _unigram(model, pieces, fixed)
    elif trained.model_type == _BPE:
        backend = _merged(model, pieces)
        backend.add_tokens([AddedToken(pieces[i], normalized=False) for i in fixed])
    else:
        raise ValueError("it is neither of the BPE nor of the unigram kind")
    charmap = rules.precompiled_charsmap
    join_words(
        backend,
        prefixed=rules.add_dummy_prefix,
        before=(normalizers.Precompiled(charmap),) if charmap else (),
        one_space=rules.remove_extra_whitespaces,
    )
    if any(
        backend.encode(text).ids != model.encode(text) for text in _texts(pieces, [pieces[i] for i in fixed])
    ):
        raise ValueError("it is of a kind that is not converted exactly; bring a tokenizer.json")
    special = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": pieces[i] for name, i in special.items() if i >= 0},
        add_bos_token=stated.get("add_bos_token", special["bos"] >= 0),
        add_eos_token=stated.get("add_eos_token", False),
        chat_template=stated.get("chat_template"),
    )


def _unigram(model: Any, pieces: list[str], fixed: list[int]) -> "Tokenizer":
    from tokenizers import Tokenizer, models

    scores = [model.get_score(i) for i in range(len(pieces))]
    others = (*fixed, *(i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)))
    best = max(
        (score for i, score in enumerate(scores) if i not in others and not model.is_byte(i)), default=0.0
    )
    for i in fixed:  # as sentencepiece itself has it, so that no other path beats one through these
        scores[i] = len(pieces[i].encode()) * best - 0.1
    has_bytes = any(map(model.is_byte, range(len(pieces))))
    vocabulary = list(zip(pieces, scores, strict=True))
    return Tokenizer(models.Unigram(vocabulary, unk_id=model.unk_id(), byte_fallback=has_bytes))


def _merged(model: Any, pieces: list[str]) -> "Tokenizer":
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    ids = range(len(pieces))
    control = [i for i in (model.unk_id(), *filter(model.is_control, ids)) if i >= 0]
    described = {
        "tokenizer_type": "llama",
        "tokens": pieces,
        "scores": [model.get_score(i) for i in ids],
        "token_type": [3 if i in control else 1 for i in ids],
    }
    return mapping.convert_gguf_tokenizer("llama", described)[0]


def _texts(pieces: list[str], fixed: list[str]) -> Iterator[str]:
    """Yield the texts that both have to take apart in the same way."""
    yield from _SAMPLES
    for piece in fixed[:1000]:
        yield f"a{piece}b {piece} {piece}{piece}"
    rng = random.Random(0)
    plain = [piece for piece in pieces if not (piece.startswith("<") and piece.endswith(">"))]
    for _ in range(_RANDOM_SAMPLES if plain else 0):
        yield "".join(rng.choices(plain, k=32)).replace("▁", " ")


@contextmanager
def as_one_line(path: Path) -> Iterator[None]:
    """Turn whatever transformers and tokenizers raise for a broken file, panics of their Rust included, into one."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, TwlaError):
        raise
    except BaseException as error:  # a panic is no Exception
        reason = " ".join(str(error).split())[:200]
        raise TwlaError(f"{path}: the tokenizer cannot be read ({reason})") from error
