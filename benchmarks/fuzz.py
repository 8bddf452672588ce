"""Feeds random bytes to everything that reads a stranger's file: nothing but `TwlaError` may come out.

    pip install 'twla-jax[fuzz]'
    python benchmarks/fuzz.py gguf -max_total_time=300

Options after the target are libFuzzer's. It begins with the files in `benchmarks/fuzz_corpus/TARGET`; an input that
ends in another error, takes 20 seconds or 4 GB is written to `crash-…`, and is read again by `python benchmarks/fuzz.py
TARGET crash-…`. With `--note FOLDER` before the options it goes on after an error: there it keeps the first input that
ends at each place, with its traceback, and counts inputs. The tests read the corpus: what was mended belongs there.
"""

import atexit
import functools
import gc
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_files

from twla_jax.errors import TwlaError  # before the fuzzer watches: it would count the letters of messages

os.environ.setdefault("JAX_PLATFORMS", "cpu")
CORPUS = Path(__file__).parent / "fuzz_corpus"
SIZES = {
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
CONFIG = {"model_type": "llama", **SIZES}


def gguf(data: bytes) -> None:
    """Read a `.gguf` file: settings, tensors, tokenizer."""
    from twla_jax.models.io import gguf as reader
    from twla_jax.models.io.gguf_file import GgufFile
    from twla_jax.models.io.tokenizer import tokenizer_from_gguf

    file = GgufFile(_folder({"model.gguf": data}) / "model.gguf")
    for read in (reader.read_config, reader.load_model, tokenizer_from_gguf):
        with _refused():
            read(file)


def metadata(data: bytes) -> None:
    """Read the settings of a `.gguf` file with this JSON as its metadata; `factors` is the length of LongRoPE's."""
    from fuzz_seeds import gguf_file

    from twla_jax.models.io import gguf as reader
    from twla_jax.models.io.gguf_file import GgufFile
    from twla_jax.models.io.tokenizer import tokenizer_from_gguf

    try:
        file = gguf_file(_object(data))
    except (ValueError, RecursionError, struct.error):
        return
    folder = _folder({"model.gguf": file})
    opened = GgufFile(folder / "model.gguf")
    for read in (reader.read_config, tokenizer_from_gguf):
        with _refused():
            read(opened)


def safetensors(data: bytes) -> None:
    """Read `model.safetensors` beside a configuration of plain weights, or of such in eight bits, or of experts."""
    from twla_jax.models.io.huggingface import load_model

    scaled = b"F8_" in data or b"scale" in data
    more = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}} if scaled else {}
    if b"experts" in data:
        more["model_type"], more["num_local_experts"] = "mixtral", 2
    files = {"model.safetensors": data, "config.json": json.dumps({**CONFIG, **more}).encode()}
    folder = _folder(files)
    load_model(folder)


def index(data: bytes) -> None:
    """Read `model.safetensors.index.json` beside a shard."""
    from twla_jax.models.io.huggingface import load_model

    shard = (CORPUS / "safetensors" / "llama").read_bytes()
    files = {
        "model.safetensors.index.json": data,
        "a.safetensors": shard,
        "config.json": json.dumps(CONFIG).encode(),
    }
    folder = _folder(files)
    load_model(folder)


def config(data: bytes) -> None:
    """Read `config.json` and `generation_config.json`."""
    from twla_jax.models.io.huggingface import read_config

    folder = _folder({"config.json": data})
    with _refused():
        read_config(folder)
    if b"eos_token_id" not in data:  # of the other file nothing else is read
        return
    folder = _folder({"config.json": json.dumps(CONFIG).encode(), "generation_config.json": data})
    read_config(folder)


def tokenizer(data: bytes) -> None:
    """Read a tokenizer's files; the first byte says which."""
    from twla_jax.models.io.tokenizer import load_tokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    name = names[data[0] % len(names)] if data else names[0]
    folder = _folder({name: data[1:]}, on_disk=True)
    load_tokenizer(folder)("a text, 12")


def recipe(data: bytes) -> None:
    """Read a recipe, and what it says again."""
    from twla_jax.recipe import Recipe, load_recipe

    folder = _folder({"mine.toml": data})
    read = load_recipe(folder / "mine.toml")
    assert Recipe.from_dict(read.to_dict()) == read


def text(data: bytes) -> None:
    """Read a text; the first byte says of which kind."""
    from twla_jax.text import corpora

    kinds = (".txt", ".jsonl", ".json", ".csv", ".JSONL", ".md")
    name = f"text{kinds[data[0] % len(kinds)]}" if data else "text.txt"
    folder = _folder({name: data[1:]}, on_disk=corpora.Path is Path)
    corpora.load_corpus(folder / name, "calibration")


def manifest(data: bytes) -> None:
    """Read a quantised folder whose manifest has these values in place of its own, sealed again."""
    from twla_jax.storage import checkpoint
    from twla_jax.storage.manifest import MANIFEST

    folder = _quantized_folder()
    with _refused():
        try:
            change = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(change, dict):
            return
        changed = _merged(_manifest(), change)
        changed.pop("checksum", None)
        try:
            body = json.dumps(changed, sort_keys=True)
        except (ValueError, RecursionError):
            return
        sealed = hashlib.sha256(body.encode()).hexdigest()  # as the library does it, but written once
        (checkpoint.Path(str(folder)) / MANIFEST).write_text(f'{body[:-1]}, "checksum": "{sealed}"}}')
        checkpoint.load(folder)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "gguf": gguf,
    "metadata": metadata,
    "safetensors": safetensors,
    "index": index,
    "config": config,
    "tokenizer": tokenizer,
    "recipe": recipe,
    "text": text,
    "manifest": manifest,
}


# Changed as JSON, after so many bytes.
JSON = {"config": 0, "index": 0, "manifest": 0, "metadata": 0, "safetensors": 8, "tokenizer": 1}


def run(target: str, data: bytes) -> None:
    """Give one input to a target; what the library refuses is right."""
    with _refused():
        TARGETS[target](data)


def noting(target: str, folder: Path) -> Callable[[bytes], None]:
    """Return what gives an input to a target, counts it, and keeps the first that ends in an error of each place."""
    folder.mkdir(parents=True, exist_ok=True)
    counter = folder / f"{target}.{os.getpid()}.count"
    seen: set[str] = set()
    count = 0

    def note(data: bytes) -> None:
        nonlocal count
        count += 1
        if count % 500 == 0:
            counter.write_text(str(count))
        try:
            run(target, data)
        except Exception as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            place = f"{type(error).__name__}.{Path(last.filename).stem}.{last.lineno}"
            if place not in seen:
                seen.add(place)
                (folder / f"{target}.{place}.input").write_bytes(data)
                (folder / f"{target}.{place}.traceback").write_text(traceback.format_exc())

    return note


class _refused:  # a generator would take as long as some readers
    """Passes over what the library refuses in one line."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, _: Any) -> bool:
        if kind is None or not issubclass(kind, TwlaError):
            return False
        if len(str(error).splitlines()) != 1 or len(str(error)) > 2000:
            raise AssertionError("no message of one line") from error
        return True


def _folder(files: dict[str, bytes], on_disk: bool = False) -> Path:
    """Return a folder with these files and no other; it is the same one every time, and most files are in memory."""
    return fuzz_files.put(_place(), files, on_disk=on_disk)


@functools.cache
def _place() -> Path:
    """Return an empty folder in memory, where there is such, that ends with the process."""
    keep = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    atexit.register(shutil.rmtree, keep, ignore_errors=True)
    return keep


def _merged(values: Any, change: dict[str, Any]) -> Any:
    """Return nested objects with those of `change` in their place, however deep."""
    result = dict(values)
    for key, value in change.items():
        inside = result.get(key)
        both = isinstance(inside, dict) and isinstance(value, dict)
        result[key] = _merged(inside, value) if both and isinstance(inside, dict) else value
    return result


@functools.cache
def _quantized_folder() -> Path:
    """Return a folder of the smallest quantised model, which ends with the process."""
    import numpy as np
    from flax import nnx

    import twla_jax
    from twla_jax.models.decoder import Decoder
    from twla_jax.models.families import config_from_hf

    model = Decoder(config_from_hf(CONFIG), rngs=nnx.Rngs(0))
    settings = {"weights": {"group_size": 4}, "rotation": False}
    windows = np.arange(16).reshape(2, 8) % 8
    quantized, _ = twla_jax.quantize(model, windows, twla_jax.Recipe.from_dict(settings), progress=False)
    out = _place() / "out"
    twla_jax.save(quantized, None, out, twla_jax.Recipe.from_dict(settings), {})
    return out


@functools.cache
def _manifest() -> dict[str, Any]:
    from twla_jax.storage.manifest import MANIFEST

    return json.loads((_quantized_folder() / MANIFEST).read_text())


def _known(target: str) -> list[Any]:
    """Return JSON whose keys and values the mutator tries."""
    from twla_jax.models.families import FAMILIES

    if target == "manifest":
        return [_manifest()]
    if target == "safetensors":
        files = [(CORPUS / target / name).read_bytes() for name in ("llama", "eight-bits", "experts")]
        return [json.loads(file[8 : 8 + struct.unpack("<Q", file[:8])[0]]) for file in files]
    known = [_object(path.read_bytes()[JSON[target] :]) for path in sorted((CORPUS / target).iterdir())]
    if target == "metadata":
        from twla_jax.models.families import by_gguf_architecture
        from twla_jax.models.io import gguf as reader

        for name in by_gguf_architecture():
            keys = (*reader._CHECKS, *reader._REFUSED)
            known.append({"general.architecture": name, **{f"{name}.{key}": 1 for key in keys}})
    if target == "config":
        known += [{"model_type": name, **SIZES, **family.defaults} for name, family in FAMILIES.items()]
    return known


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _repeat_nothing() -> None:
    """Keep what takes most of an execution's time and is the same in the next: traced shapes, arrays, checksums."""
    from flax import nnx

    from twla_jax import json_files, recipe
    from twla_jax.storage import checkpoint, folders, manifest, parameters
    from twla_jax.text import corpora

    corpora.Path = checkpoint.Path = manifest.Path = fuzz_files.MemoryPath

    trace, restore, fingerprint = nnx.eval_shape, parameters.restore, folders.fingerprint
    read = json_files.read_json
    read_once = functools.cache(read)
    traced: dict[str, Any] = {}
    restored: set[str] = set()

    def eval_shape(function):
        key = repr([cell.cell_contents for cell in function.__closure__ or ()])
        if key not in traced:
            if len(traced) > 1000:
                traced.clear()
            traced[key] = nnx.split(trace(function))
        graph, state = traced[key]
        return nnx.merge(graph, state, copy=True)

    def restore_once(model, params, tensors, mesh):
        key = json.dumps(tensors, sort_keys=True)
        if key not in restored:
            restored.add(key)
            restore(model, params, tensors, mesh)

    nnx.eval_shape, parameters.restore = eval_shape, restore_once
    folders.fingerprint = functools.cache(fingerprint)
    recipe.recipe_names = functools.cache(recipe.recipe_names)
    if _quantized_folder.cache_info().currsize:
        fuzz_files.hold(_quantized_folder())
    json_files.read_json = lambda path: (read_once if path.name == ".zarray" else read)(path)


# Whose branches the fuzzer looks at: the readers, and not the kernels.
_WATCHED = [
    *(
        f"twla_jax.{name}"
        for name in ("schema", "json_files", "recipe", "text", "models.io", "models.families")
    ),
    *(f"twla_jax.{name}" for name in ("models.config", "models.config_keys", "models.rope_settings")),
    *("twla_jax.storage.manifest", "twla_jax.storage.parameters"),
]


def main() -> None:
    """Fuzz the target that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz.py {{{','.join(TARGETS)}}} [options of libFuzzer] [inputs]")
    target = sys.argv.pop(1)
    tried = functools.partial(run, target)
    if sys.argv[1:2] == ["--note"]:
        tried = noting(target, Path(sys.argv[2]))
        del sys.argv[1:3]
    import atheris  # pyright: ignore[reportMissingImports]

    with atheris.instrument_imports(include=_WATCHED):
        import fuzz_json

        from twla_jax.jobs import stages  # noqa: F401 - which imports every reader
        from twla_jax.models.io import readers  # noqa: F401
    for path in sorted(
        (CORPUS / target).iterdir()
    ):  # what is imported for them takes longer than an input may
        run(target, path.read_bytes())
    _repeat_nothing()
    # What is there stays: looking through it for garbage took a third of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    options = {}
    if target in JSON:
        # Looked up at every call: until the fuzzer runs, atheris has another function of that name.
        options["custom_mutator"] = fuzz_json.mutator(
            _known(target), lambda data, most: atheris.Mutate(data, most), JSON[target]
        )
    with tempfile.TemporaryDirectory() as found:  # new inputs go to the first folder
        given = any(not each.startswith("-") for each in sys.argv[1:])
        folders = [] if given else [found, str(CORPUS / target)]
        limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=4096"]
        atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], *folders], tried, **options)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
