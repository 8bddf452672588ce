"""No content of a model's files ends in an exception that is not the library's own."""

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.config_keys import READ, REFUSED
from twla_jax.models.families import FAMILIES, config_from_hf
from twla_jax.models.io import gguf
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.models.io.readers import load_model, read_config
from twla_jax.models.io.tokenizer import load_tokenizer, tokenizer_from_gguf

quick = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PLAIN = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROPE = [
    *(
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "mscale",
    ),
    *("original_max_position_embeddings", "attention_factor", "short_factor", "long_factor", "truncate"),
]
KINDS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "linear",
    "llama3",
    "yarn",
    "longrope",
    "dynamic",
    "sliding_attention",
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 4, 8, 64, 10**12, 2**63, -1, 1e-5, 1e400, 2.0, 10**400])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(KINDS)
)
rope = st.dictionaries(st.sampled_from(ROPE), scalars | st.lists(scalars, max_size=5), max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
OWN = sorted({key for family in FAMILIES.values() for key in family.keys})
configs = st.dictionaries(st.sampled_from([*READ, *REFUSED, *OWN]), values | rope, max_size=4)


@quick
@given(configs, st.sampled_from([*FAMILIES, None]))
def test_any_config_is_read_or_refused_in_one_line(change, family):
    try:
        config = config_from_hf({**PLAIN, "model_type": family, **change} if family else change)
    except TwlaError as error:
        message = str(error)
    else:
        message = ""
        assert config.num_heads % config.num_kv_heads == 0
        assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert len(message.splitlines()) <= 1
    assert len(message) < 500


@quick
@given(
    name=st.sampled_from(
        [
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
            "tokenizer_config.json",
            "tokenizer.json",
        ]
    ),
    content=st.binary(max_size=40)
    | st.text(max_size=40).map(str.encode)
    | values.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(
        st.sampled_from(["weight_map", "eos_token_id", "chat_template", "bos_token", "auto_map", "model"]),
        values,
    ).map(lambda value: json.dumps(value).encode()),
)
def test_any_file_of_a_folder_is_read_or_refused(name, content, golden, tmp_path):
    folder = tmp_path / "model"
    if not folder.exists():
        folder.mkdir()
        golden("llama").write(folder)
    (folder / name).write_bytes(content)
    with contextlib.suppress(TwlaError):
        load_tokenizer(folder) if name.startswith("tokenizer") else load_model(folder)
    (folder / name).unlink()
    golden("llama").write(folder)


def number(kind, value):
    return struct.pack("<I", kind) + struct.pack({4: "<I", 5: "<i", 6: "<f", 10: "<Q", 12: "<d"}[kind], value)


def string(value):
    return struct.pack("<Q", len(value)) + value


numbers = (
    st.integers(0, 2**32 - 1).map(lambda value: number(4, value))
    | st.integers(0, 2**64 - 1).map(lambda value: number(10, value))
    | st.sampled_from([0, 1, 2, 4, 8, 16, 64]).map(lambda value: number(4, value))
    | st.floats(width=32).map(lambda value: number(6, value))
    | st.binary(max_size=6).map(lambda value: struct.pack("<I", 8) + string(value))
    | st.lists(st.integers(0, 9), max_size=3).map(
        lambda v: struct.pack("<IIQ", 9, 4, len(v)) + struct.pack(f"<{len(v)}I", *v)
    )
    | st.lists(st.binary(max_size=3), max_size=3).map(
        lambda v: struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(string, v))
    )
)
SETTINGS = [f"llama.{key}" for key in (*gguf._CHECKS, *gguf._REFUSED)]
SETTINGS += ["general.alignment", "split.count", "split.no", "tokenizer.ggml.eos_token_id"]
SETTINGS += [
    f"tokenizer.ggml.{key}"
    for key in ("model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id")
]


@quick
@given(entries=st.dictionaries(st.sampled_from(SETTINGS), numbers, max_size=12), tail=st.binary(max_size=8))
def test_any_gguf_metadata_is_read_or_refused(entries, tail, tmp_path):
    path = tmp_path / "model.gguf"
    entries = {"general.architecture": struct.pack("<I", 8) + string(b"llama"), **entries}
    body = b"".join(string(key.encode()) + value for key, value in entries.items())
    tensor = string(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 4, 0, 0)
    content = b"GGUF" + struct.pack("<IQQ", 3, 1, len(entries)) + body + tensor + tail
    path.write_bytes(content + bytes(512))
    try:
        file = GgufFile(path)
    except TwlaError:
        return
    for read in (gguf.read_config, gguf.load_model, tokenizer_from_gguf):
        with contextlib.suppress(TwlaError):
            read(file)


def test_a_folder_that_may_not_be_entered_or_has_an_odd_name_is_one_line(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path / "a\0b", tmp_path / "none"):
        with pytest.raises(TwlaError):
            read_config(path)
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(TwlaError, match="not a regular file"):
        read_config(tmp_path)
