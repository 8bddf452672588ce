"""Finds texts that Python and the machine carry, for those without network or data: code, notes and languages.

Each is split by a hash of its documents' names, so that what calibrates never evaluates.
"""

import dataclasses
import gettext
import importlib.metadata
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from twla_jax.text.files import Text
from twla_jax.text.named import Split, for_evaluation

_LANGUAGES = ("de", "fr", "es", "zh_CN")
_LOCALES = Path("/usr/share/locale")
_SKIPPED = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "encodings",
    "lib2to3",
    "__pycache__",
}
_LEAST_LETTERS = 40  # of a message
_LEAST_TEXT = 40_000  # letters of all messages, below which they have no window worth drawing


def stdlib(split: Split) -> Text:
    """Return program text: the standard library's own source and the headers of Python."""
    folders = [
        (Path(sysconfig.get_path(key)), f"*.{end}") for key, end in (("stdlib", "py"), ("include", "h"))
    ]
    documents = []
    for folder, pattern in folders:
        for file in sorted(folder.rglob(pattern)):
            name = file.relative_to(folder)
            if not _SKIPPED & set(name.parts) and for_evaluation(name.parts[0]) == (split == "evaluation"):
                documents.append(file.read_text(encoding="utf-8", errors="ignore"))
    return _join(documents, "the standard library of this Python, and its C headers")


def notes(split: Split) -> Text:
    """Return prose about software: what installed packages say of themselves and, to calibrate on, licences."""
    documents = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"] or ""
        if for_evaluation(name) == (split == "evaluation"):
            _, _, body = (package.read_text("METADATA") or "").partition("\n\n")
            documents.setdefault(name, body.strip())
    licences = [
        Path(sysconfig.get_path("stdlib"), "LICENSE.txt"),
        *Path("/usr/share/common-licenses").glob("*"),
    ]
    for file in licences if split == "calibration" else ():  # they share terms, so that no two are strangers
        if file.is_file() and not file.is_symlink():
            documents[f"licence {file.name}"] = file.read_text(encoding="utf-8", errors="ignore").strip()
    chosen = [documents[name] for name in sorted(documents)]
    return _join(
        list(dict.fromkeys(filter(None, chosen))), "descriptions of installed packages, and licences"
    )


def languages(split: Split) -> Text:
    """Return the machine's own messages in German, French, Spanish and Chinese; empty where it has few."""
    chosen: dict[str, None] = {}
    for file in sorted(
        file for language in _LANGUAGES for file in _LOCALES.glob(f"{language}/LC_MESSAGES/*.mo")
    ):
        for source, translated in _catalogue(file):
            if len(translated) >= _LEAST_LETTERS and for_evaluation(source) == (split == "evaluation"):
                chosen[translated] = None
    text = _join(list(chosen), "message catalogues of this machine", "\n")
    return text if len(text.text) >= _LEAST_TEXT else dataclasses.replace(text, text="")


def _catalogue(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with file.open("rb") as opened:
            catalogue = gettext.GNUTranslations(opened)._catalog  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, UnicodeDecodeError, ValueError, LookupError):  # not for us to mend
        return
    for source, translated in catalogue.items():
        if isinstance(source, str) and source:  # the entry without a source holds the catalogue's settings
            yield source, translated


def _join(documents: list[str], source: str, join: str = "\n\n") -> Text:
    return Text(text=join.join(documents), source=source, join=join)
