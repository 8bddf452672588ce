"""Finds models by their id on the Hugging Face hub: `org/name`, `org/name@revision`, `org/name:file.gguf`.

What is fetched lies in the hub client's own cache; its token, its endpoint and HF_HUB_OFFLINE are respected. Settings
and tokenizer come first, so that a model that is not supported is refused before its weights are fetched.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from twla_jax.errors import TwlaError
from twla_jax.json_files import read_json
from twla_jax.models.io import huggingface
from twla_jax.models.io.shards import INDEX, SINGLE, indexed_files
from twla_jax.schema import check_values, mapping

_QUANTIZED = "twla.json"  # of a folder that this library wrote
_SETTINGS = (
    _QUANTIZED,
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?(?::(?P<file>[^:@]+\.gguf))?"
)
_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_CACHED = re.compile(r"models--(.+?)--(.+)")
_FEW = 6  # names that a message lists


class HubName(NamedTuple):
    """A model on the hub: the repository, its revision (None for the newest) and one GGUF file of it, if so named."""

    repo: str
    revision: str | None = None
    file: str | None = None


def parse(name: str) -> HubName | None:
    """Return what a name means on the hub; None where it cannot be a name there."""
    found = _NAME.fullmatch(name)
    return HubName(**found.groupdict()) if found else None


def fetch(name: HubName, *, weights: bool = True) -> Path:
    """Return the path of a model in the hub client's cache, fetched where it is not there yet.

    Args:
      name: of the model.
      weights: whether weights are needed, or settings and tokenizer alone. A GGUF file and a quantised folder are
        always fetched whole.

    Raises:
      TwlaError: there is no such model, revision or file, or no access or no way to it; or its architecture is not
        supported, or it has no weights that are read.
    """
    if name.file is not None:
        return _gguf(name, name.file)
    folder = _snapshot(name, _SETTINGS)
    if (folder / _QUANTIZED).exists():
        manifest = read_json(folder / _QUANTIZED)
        check_values(manifest, {"files": mapping()}, str(folder / _QUANTIZED))
        _snapshot(name._replace(revision=folder.name), list(manifest.get("files", ())))
        return folder
    if not (folder / "config.json").exists():
        return _gguf(name, _only_gguf(name, folder))
    huggingface.read_config(folder)  # refuses what would be fetched in vain
    if weights:
        fixed = name._replace(
            revision=folder.name
        )  # the same revision, also where the newest changes meanwhile
        files = indexed_files(folder) if (folder / INDEX).exists() else [SINGLE]
        _snapshot(fixed, files)
        if not (folder / files[0]).exists():
            return _gguf(name, _only_gguf(name, folder))
    return folder


def origin(path: Path) -> dict[str, str]:
    """Return the `name` and `revision` of a path in the hub client's cache, nothing of another path."""
    for place in (path, path.parent):
        repo = _CACHED.fullmatch(place.parent.parent.name)
        if repo and place.parent.name == "snapshots":
            file = f":{path.name}" if place != path else ""
            return {"name": f"{repo[1]}/{repo[2]}{file}", "revision": place.name}
    return {}


def _snapshot(name: HubName, files: Sequence[str]) -> Path:
    import huggingface_hub

    with _in_one_line(name):
        return Path(
            huggingface_hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=list(files))
        )


def _gguf(name: HubName, file: str) -> Path:
    """Return a GGUF file, once all parts of a split one are there."""
    split = _SPLIT.fullmatch(file)
    parts = (
        [f"{split[1]}-{i:05}-of-{split[2]}.gguf" for i in range(1, int(split[2]) + 1)] if split else [file]
    )
    folder = _snapshot(name, parts)
    if not (folder / file).exists():
        raise TwlaError(f"{name.repo}: has no file {file}{_such_as(_listed(name, folder))}")
    return folder / file


def _only_gguf(name: HubName, folder: Path) -> str:
    """Return the one GGUF file of a repository without safetensors, of a split one the first part."""
    listed = _listed(name, folder)
    models = [file for file in listed if not (found := _SPLIT.fullmatch(file)) or "-00001-of-" in found[0]]
    if len(models) == 1:
        return models[0]
    if models:
        raise TwlaError(f"{name.repo}: holds several GGUF files; name one{_such_as(models, name.repo)}")
    raise TwlaError(
        f"{name.repo}: holds neither {SINGLE}, {INDEX} nor a .gguf file, and other weights are not read"
    )


def _listed(name: HubName, folder: Path) -> list[str]:
    """Return the repository's GGUF files; where there is no way to it, those in its folder of the cache."""
    import huggingface_hub

    try:
        files = huggingface_hub.HfApi().list_repo_files(name.repo, revision=name.revision)
    except Exception:  # offline, or no access any more
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    return sorted(file for file in files if file.endswith(".gguf"))


def _such_as(files: Sequence[str], repo: str | None = None) -> str:
    if not files:
        return ""
    begin = f"{repo}:" if repo else ""
    more = f" and {len(files) - _FEW} more" if len(files) > _FEW else ""
    return f": {', '.join(begin + file for file in files[:_FEW])}{more}"


@contextlib.contextmanager
def _in_one_line(name: HubName) -> Iterator[None]:
    """Turn what the hub client raises into one line that says what to do."""
    from huggingface_hub import constants, errors

    at = f"{name.repo}@{name.revision}" if name.revision else name.repo
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise TwlaError(f"{at}: is gated; accept its terms on its page of the hub, then {login}") from error
    except errors.RepositoryNotFoundError as error:
        raise TwlaError(
            f"{at}: is no folder here, and the hub has no such model; or it is private, then {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise TwlaError(f"{at}: the model has no revision {name.revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise TwlaError(f"{at}: is no folder here, is not in the hub's cache, and {why}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.EntryNotFoundError) as error:
        raise TwlaError(f"{at}: cannot be fetched from the hub ({_first_line(error)})") from error
    except Exception as error:
        if isinstance(error, TwlaError) or not _is_of_network(error):
            raise
        raise TwlaError(
            f"{at}: the connection to the hub broke ({_first_line(error)}); run it again"
        ) from error


def _is_of_network(error: Any) -> bool:
    return type(error).__module__.split(".")[0].startswith(("httpx", "httpcore", "requests", "urllib3"))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]
