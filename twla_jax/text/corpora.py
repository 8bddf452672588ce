"""Finds corpora by name or path, each marked for calibration or for evaluation, and turns them into tokens."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from twla_jax.errors import TwlaError
from twla_jax.text import chat, files, machine, mix, named
from twla_jax.text.files import Messages, Text
from twla_jax.text.named import Split
from twla_jax.text.token_ids import added_bos, cut, text_length, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The public wiki.test.raw: recognised by content, so that no path to it passes for calibration text.
WIKITEXT2_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
SELF = "self"  # text that the model samples itself; see `self_sampling`
_LETTERS_PER_TOKEN = 12  # more than any text has
MIX = "mix"  # the default: a text of every domain that can be had, see `mix`
_NAMED: dict[str, Callable[[Split], Text]] = {**named.NAMED, "stdlib": machine.stdlib, "notes": machine.notes}
_MIXES: dict[str, Callable[[Split], dict[str, Text]]] = {MIX: mix.parts, "mix-online": mix.online_parts}
_NOT_TO_CALIBRATE_ON = "is an evaluation text: no setting may be chosen on it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text with what is needed to find it again.

    Attributes:
      name: as it was asked for.
      split: what it may be used for.
      text: the whole text.
      source: where it was read from, in words.
      join: the string between its documents; empty for a text kept as the file has it.
      chats: its documents where all are chats.
      parts: its domains where it is a mix, from which windows are drawn in equal numbers.
    """

    name: str
    split: Split
    text: str
    source: str
    join: str = ""
    chats: tuple[Messages, ...] = dataclasses.field(default=(), repr=False)
    parts: tuple["Corpus", ...] = ()

    @property
    def sha256(self) -> str:
        """Return the hash of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what a report says of the corpus: everything but the text."""
        domains = {"domains": [part.name for part in self.parts]} if self.parts else {}
        return {
            "name": self.name,
            "split": self.split,
            "source": self.source,
            "join": self.join,
            "sha256": self.sha256,
            **domains,
        }


def corpus_names() -> list[str]:
    """Return the names that `load_corpus` knows, beside paths and several joined by `+`."""
    return [*_NAMED, *_MIXES, *mix.DOMAINS]


def load_corpus(name: str | Path, split: Split) -> Corpus:
    """Read a corpus for one purpose; the texts of the two purposes are disjoint for every name.

    Args:
      name: `mix`, a text of every domain at hand, or `mix-online`, from public data sets; `pydoc`, `stdlib` or `notes`
        (in every Python); `wikitext2`, `wikitext2-train` or `c4` (from the folder `TWLA_DATA`, else through the
        `datasets` package when online); a domain of that folder (`chat`, `code`, `prose`, `science`, `stories`,
        `german`, …); the path of a file or folder that `files.read` reads; or several of these joined by `+`, which
        are concatenated, or kept apart as domains where one of them is a mix.
      split: `calibration` or `evaluation`. A path is taken at its word, save for texts known to be for evaluation.
    Raises:
      TwlaError: an unknown name, `self`, which has no text before a model sampled it, a file that cannot be read as
        text, an empty corpus, or evaluation text asked for calibration.
    """
    names = str(name).split("+")
    if not all(part.strip() for part in names) and not (str(name).strip() and _exists(name)):
        raise TwlaError(
            f"corpus '{name}': a name is empty; it is a file, a folder or one of: {', '.join(corpus_names())}"
        )
    if SELF in map(str.strip, names):
        raise TwlaError(
            "corpus 'self' is text that the model samples itself: for 'twla quantize --calibration self' alone,"
            " never for evaluation, and not with other texts"
        )
    if len(names) > 1 and not _exists(name):
        corpora = [load_corpus(part.strip(), split) for part in names]
        apart = tuple(part for corpus in corpora for part in corpus.parts or (corpus,))
        return _join(str(name), corpora, apart if any(corpus.parts for corpus in corpora) else ())
    if str(name) in _MIXES:
        texts = _MIXES[str(name)](split)
        parts = tuple(_corpus(part, split, text) for part, text in texts.items())
        return _join(str(name), parts, parts)
    return _corpus(str(name), split, _read(name, split))


def load_domains(names: str | Path, split: Split = "evaluation") -> dict[str, Corpus]:
    """Return several corpora by name, to be looked at one by one.

    Args:
      names: a folder, whose texts are a domain each; or names and paths that `load_corpus` takes,
        with commas between them. A mix stands for its domains, and a file `languages.jsonl` for its languages.
      split: what they may be used for.
    Raises:
      TwlaError: as `load_corpus`.
    """
    found: dict[str, Corpus] = {}
    if str(names).strip() and _exists(names) and Path(names).is_dir():  # an empty path is the current folder
        for file in files.text_files(Path(names)):
            place = file.relative_to(names)
            if split == "calibration" and mix.is_evaluation_file(file):
                raise TwlaError(f"corpus '{file}' {_NOT_TO_CALIBRATE_ON}")
            by_language = file.name == mix.LANGUAGES_FILE
            name = str(place.parent / (file.name.split(".")[0] or file.name))
            texts = mix.by_language(file) if by_language else {name: files.read(file)}
            for part, text in texts.items():
                if part in found:  # as of `a.txt` and `a.jsonl`
                    part = f"{place}:{part}" if by_language else str(place)
                found[part] = _corpus(part, split, text)
        return found
    for corpus in [load_corpus(name.strip(), split) for name in str(names).split(",")]:
        for part in corpus.parts or (corpus,):
            same = found.get(part.name, part).text == part.text
            found[part.name if same else f"{corpus.name}:{part.name}"] = part
    return found


def _exists(name: str | Path) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _is_link(name: str | Path) -> bool:
    try:
        return Path(name).is_symlink()
    except (OSError, ValueError):
        return False


def _read(name: str | Path, split: Split) -> Text:
    if str(name) in _NAMED:
        return _NAMED[str(name)](split)
    if _exists(name):
        path = Path(name)
        held = [path, *(files.text_files(path) if path.is_dir() else ())]
        if split == "calibration" and any(map(mix.is_evaluation_file, held)):
            raise TwlaError(f"corpus '{name}' {_NOT_TO_CALIBRATE_ON}")
        return files.read(path)
    if str(name) in mix.DOMAINS:
        if text := mix.domain(str(name), split):
            return text
        raise TwlaError(f"corpus '{name}' needs the folder TWLA_DATA with domains/ in it; 'mix' does not")
    if _is_link(name):
        raise TwlaError(f"corpus '{name}' is a link that leads nowhere")
    raise TwlaError(f"corpus '{name}' is neither a file, a folder nor one of: {', '.join(corpus_names())}")


def _corpus(name: str, split: Split, text: Text) -> Corpus:
    if not text.text.strip():
        raise TwlaError(f"corpus '{name}' ({text.source}) is empty")
    corpus = Corpus(
        name=name, split=split, text=text.text, source=text.source, join=text.join, chats=text.chats
    )
    if split == "calibration" and corpus.sha256 == WIKITEXT2_TEST_SHA256:
        raise TwlaError(f"corpus '{name}' is WikiText-2's test split, which is for evaluation only")
    return corpus


def _join(name: str, corpora: Sequence[Corpus], parts: tuple[Corpus, ...]) -> Corpus:
    return Corpus(
        name=name,
        split=corpora[0].split,
        text="\n\n".join(corpus.text for corpus in corpora),
        source="; ".join(corpus.source for corpus in corpora),
        join="\n\n",
        parts=parts,
    )


def first_windows(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, count: int, seq_len: int
) -> Int32[np.ndarray, "w seq_len"]:
    """Return the first windows of a text, cut one after another; of a mix those of its domains in turn.

    Raises:
      TwlaError: a text or a domain that is shorter than a window, and what `tokenize` refuses.
    """
    parts = (corpus.parts or (corpus,))[:count]
    each = -(-count // len(parts))
    rows = []
    for part in parts:
        tokens = tokenize(part, tokenizer, vocab_size, _LETTERS_PER_TOKEN * each * seq_len)
        length = text_length(tokens, seq_len)
        if len(tokens) < length:
            raise TwlaError(
                f"corpus '{part.name}' has {len(tokens)} tokens, fewer than one window of {seq_len}: shorten --seq-len"
            )
        rows.append(cut(tokens, np.arange(min(each, len(tokens) // length)) * length, seq_len))
    in_turn = [row[turn] for turn in range(each) for row in rows if turn < len(row)]
    return np.stack(in_turn[:count])


def require_calibration(corpus: Corpus) -> Corpus:
    """Return the corpus itself when it is marked for calibration.

    Raises:
      TwlaError: it is marked for evaluation; no setting may ever be chosen on such text.
    """
    if corpus.split != "calibration":
        raise TwlaError(f"corpus '{corpus.name}' is marked for {corpus.split} and cannot be calibrated on")
    return corpus


def tokenize(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int, letters: int | None = None
) -> Int32[np.ndarray, " t"]:
    """Return the token ids of the whole text at once.

    Where the tokenizer puts BOS before a text, it is not among the ids: every window cut from them begins with it.
    Chats are rendered by the tokenizer's chat template, where it has one.

    Args:
      corpus: text, and the chats it consists of where it does.
      tokenizer: of the model.
      vocab_size: of the model.
      letters: only so many of the text's first characters, which saves time where that is text enough.
    Raises:
      TwlaError: no tokenizer, or an id that the model's vocabulary lacks: this is another model's tokenizer.
    """
    if tokenizer is None:
        raise TwlaError(f"corpus '{corpus.name}' needs the model's tokenizer, and its folder has none")
    if corpus.chats and getattr(tokenizer, "chat_template", None):
        held = chat.encode_rendered(tokenizer, _rendered(corpus.chats, tokenizer, letters)[:letters])
    else:
        held = tokenizer(corpus.text[:letters], verbose=False)["input_ids"]
    ids = np.asarray(held, np.int32)
    tokens = token_ids(ids, added_bos(tokenizer))
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise TwlaError(
            f"corpus '{corpus.name}' has token id {tokens.max()}, but the model's vocabulary ends at {vocab_size - 1}"
        )
    return tokens


def _rendered(chats: Sequence[Messages], tokenizer: "PreTrainedTokenizerBase", letters: int | None) -> str:
    rendered, length = [], 0
    for messages in chats:
        rendered.append(chat.render_chat(tokenizer, messages, answer=False))
        length += len(rendered[-1])
        if letters is not None and length >= letters:
            break
    return "".join(rendered)
