"""Feeds random bytes to everything that reads a stranger's file: nothing but `TwlaError` may come out.

    pip install 'twla-jax[fuzz]'
    python benchmarks/fuzz.py gguf -max_total_time=300

Options after the target are libFuzzer's. It begins with the files in `benchmarks/fuzz_corpus/TARGET`; an input that
ends in another error, takes 20 seconds or 4 GB is written to `crash-…`, and is read again by `python benchmarks/fuzz.py
TARGET crash-…`. The tests read the corpus: an input that was mended belongs there.
"""

import atexit
import contextlib
import functools
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

    with _folder({"model.gguf": data}) as folder:
        file = GgufFile(folder / "model.gguf")
        for read in (reader.read_config, reader.load_model, tokenizer_from_gguf):
            with _refused():
                read(file)


def safetensors(data: bytes) -> None:
    """Read `model.safetensors` beside a configuration, of plain weights and of such in eight bits."""
    from twla_jax.models.io.huggingface import load_model

    for more in ({}, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}):
        files = {"model.safetensors": data, "config.json": json.dumps({**CONFIG, **more}).encode()}
        with _folder(files) as folder, _refused():
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
    with _folder(files) as folder:
        load_model(folder)


def config(data: bytes) -> None:
    """Read `config.json` and `generation_config.json`."""
    from twla_jax.models.io.huggingface import read_config

    with _folder({"config.json": data}) as folder, _refused():
        read_config(folder)
    with _folder({"config.json": json.dumps(CONFIG).encode(), "generation_config.json": data}) as folder:
        read_config(folder)


def tokenizer(data: bytes) -> None:
    """Read a tokenizer's files; the first byte says which."""
    from twla_jax.models.io.tokenizer import load_tokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    name = names[data[0] % len(names)] if data else names[0]
    with _folder({name: data[1:]}) as folder:
        load_tokenizer(folder)("a text, 12")


def recipe(data: bytes) -> None:
    """Read a recipe, and what it says again."""
    from twla_jax.recipe import Recipe, load_recipe

    with _folder({"mine.toml": data}) as folder:
        read = load_recipe(folder / "mine.toml")
        assert Recipe.from_dict(read.to_dict()) == read


def text(data: bytes) -> None:
    """Read a text; the first byte says of which kind."""
    from twla_jax.text.corpora import load_corpus

    kinds = (".txt", ".jsonl", ".json", ".csv", ".JSONL", ".md")
    name = f"text{kinds[data[0] % len(kinds)]}" if data else "text.txt"
    with _folder({name: data[1:]}) as folder:
        load_corpus(str(folder / name), "calibration")


def manifest(data: bytes) -> None:
    """Read a quantised folder whose manifest has these values in place of its own, sealed again."""
    from twla_jax.storage import checkpoint
    from twla_jax.storage.manifest import MANIFEST, checksum, read_manifest

    folder = _quantized_folder()
    with _refused():
        try:
            change = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(change, dict):
            return
        changed = _merged(json.loads(_manifest()), change)
        try:
            changed["checksum"] = checksum(changed)
            content = json.dumps(changed)
        except (ValueError, RecursionError):
            return
        (folder / MANIFEST).write_text(content)
        read_manifest(folder)
        checkpoint.load(folder)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "gguf": gguf,
    "safetensors": safetensors,
    "index": index,
    "config": config,
    "tokenizer": tokenizer,
    "recipe": recipe,
    "text": text,
    "manifest": manifest,
}


def run(target: str, data: bytes) -> None:
    """Give one input to a target; what the library refuses is right."""
    with _refused():
        TARGETS[target](data)


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    from twla_jax.errors import TwlaError

    try:
        yield
    except TwlaError as error:
        if len(str(error).splitlines()) != 1 or len(str(error)) > 2000:
            raise AssertionError("no message of one line") from error


@contextlib.contextmanager
def _folder(files: dict[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        for file, content in files.items():
            Path(name, file).write_bytes(content)
        yield Path(name)


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
    keep = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, keep, ignore_errors=True)
    twla_jax.save(quantized, None, keep / "out", twla_jax.Recipe.from_dict(settings), {})
    return keep / "out"


@functools.cache
def _manifest() -> str:
    from twla_jax.storage.manifest import MANIFEST

    return (_quantized_folder() / MANIFEST).read_text()


def seeds() -> dict[str, dict[str, bytes]]:
    """Return small valid inputs of the binary targets, as they are in the corpus."""
    names = {
        "model.embed_tokens.weight": (8, 4),
        "model.norm.weight": (4,),
        **{f"model.layers.0.{each}_layernorm.weight": (4,) for each in ("input", "post_attention")},
        **{f"model.layers.0.self_attn.{each}_proj.weight": (4, 4) for each in "qkvo"},
        **{f"model.layers.0.mlp.{each}_proj.weight": (4, 4) for each in ("gate", "up", "down")},
    }

    def written(kind: str, width: int, scaled: bool) -> bytes:
        header, end = {}, 0
        for name, shape in names.items():
            eight = scaled and "proj" in name
            size = (1 if eight else width) * (
                16 if len(shape) == 2 and shape[0] == 4 else 32 if len(shape) == 2 else 4
            )
            entry = {
                "dtype": "F8_E4M3" if eight else kind,
                "shape": list(shape),
                "data_offsets": [end, end + size],
            }
            header[name], end = entry, end + size
            if eight:
                header[f"{name}_scale_inv"] = {
                    "dtype": "F32",
                    "shape": [2, 2],
                    "data_offsets": [end, end + 16],
                }
                end += 16
        head = json.dumps(header).encode()
        return struct.pack("<Q", len(head)) + head + bytes(end)

    return {
        "safetensors": {"llama": written("F32", 4, False), "eight-bits": written("BF16", 2, True)},
        "gguf": {"llama": _small_gguf()},
    }


def _small_gguf() -> bytes:
    import gguf as writers
    import numpy as np

    with tempfile.TemporaryDirectory() as name:
        writer = writers.GGUFWriter(Path(name) / "a.gguf", "llama")
        for key, value in (
            ("context_length", 16),
            ("embedding_length", 4),
            ("block_count", 1),
            ("feed_forward_length", 4),
            ("head_count", 1),
        ):
            getattr(writer, f"add_{key}")(value)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"])
        writer.add_token_scores([0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0])
        writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
        writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
        writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
        for each in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.0.{each}.weight", np.ones(4, np.float32))
        for each in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.0.{each}.weight", np.zeros((4, 4), np.float16))
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        return (Path(name) / "a.gguf").read_bytes()


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
    import atheris  # pyright: ignore[reportMissingImports]

    with atheris.instrument_imports(include=_WATCHED):
        from twla_jax.jobs import stages  # noqa: F401 - which imports every reader
        from twla_jax.models.io import readers  # noqa: F401
    run(target, b"{}")  # what is imported and made for the first input takes longer than one may
    with tempfile.TemporaryDirectory() as found:  # new inputs go to the first folder
        given = any(not each.startswith("-") for each in sys.argv[1:])
        folders = [] if given else [found, str(CORPUS / target)]
        limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=4096"]
        atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], *folders], functools.partial(run, target))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
