"""Models by their id, from a hub on this machine: only what is needed is fetched, and every failure is one line."""

import json
import os

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from twla_jax.cli import quantize
from twla_jax.errors import TwlaError
from twla_jax.jobs import loading
from twla_jax.models.io import hub
from twla_jax.models.io.readers import load_model, read_config
from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint

from helpers.chat_tokenizer import chat_tokenizer
from helpers.fake_hub import COMMIT, FakeHub


@pytest.fixture(scope="module")
def server():
    server = FakeHub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(server, tmp_path, monkeypatch):
    """The hub's client asks the server alone, and has an empty cache."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    server.models.clear()
    server.gated.clear()
    server.fetched.clear()
    return server


@pytest.fixture
def files(golden, tmp_path):
    """A published model: its folder's files, and some that nobody needs."""
    folder = tmp_path / "published"
    folder.mkdir()
    golden("llama").write(folder)
    chat_tokenizer(64).save_pretrained(folder)
    held = {path.name: path.read_bytes() for path in folder.iterdir()}
    return held | {
        "pytorch_model.bin": b"x",
        "README.md": b"x",
        "onnx/model.onnx": b"x",
        "training.log": b"x",
    }


def refusal(name, **settings):
    with pytest.raises(TwlaError) as error:
        loading.resolve_model(name, **settings)
    assert str(error.value).isprintable()
    return str(error.value)


def test_a_model_is_fetched_by_its_id_and_no_file_too_many(online, files, golden):
    online.models["org/tiny"] = files
    model, tokenizer = loading.load("org/tiny")
    np.testing.assert_array_equal(
        model.embed.get_value(), golden("llama").weights["model.embed_tokens.weight"]
    )
    assert tokenizer.chat_template
    needed = {name for name in files if name.endswith((".json", ".jinja"))} | {"model.safetensors"}
    assert set(online.fetched) == needed
    assert len(online.fetched) == len(needed)
    path = loading.resolve_model("org/tiny")
    assert len(online.fetched) == len(needed)  # everything is in the cache
    assert os.path.islink(path / "model.safetensors")
    assert loading.describe_model(path)["name"] == "org/tiny"
    assert loading.describe_model(path)["revision"] == COMMIT
    assert loading.describe_model(path)["sha256"].keys() == {"config.json", "model.safetensors"}


def test_settings_alone_need_no_weights(online, files):
    online.models["org/tiny"] = files
    assert read_config(loading.resolve_model("org/tiny@main", weights=False)).num_layers == 2
    assert "model.safetensors" not in online.fetched


def test_a_dry_run_fetches_no_weights(online, files, capsys):
    online.models["org/tiny"] = files
    quantize.quantize("org/tiny", "out", dry_run=True)
    assert "roughly" in capsys.readouterr().out
    assert "model.safetensors" not in online.fetched


def test_what_is_not_supported_is_refused_before_its_weights_are_fetched(online, files):
    online.models["org/other"] = {**files, "config.json": b'{"model_type": "gpt_neox"}'}
    assert "architecture 'gpt_neox' is not supported" in refusal("org/other")
    quantized = {
        **json.loads(files["config.json"]),
        "quantization_config": {"quant_method": "awq", "bits": 4},
    }
    online.models["org/awq"] = {**files, "config.json": json.dumps(quantized).encode()}
    assert "quantised already (awq, 4 bits)" in refusal("org/awq")
    assert "model.safetensors" not in online.fetched


def test_of_a_model_in_shards_those_of_the_index_are_fetched(online, files, golden, tmp_path):
    case = golden("llama")
    names = sorted(case.weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    held = {name: content for name, content in files.items() if name != "model.safetensors"}
    for shard, tensors in shards.items():
        save_file({name: case.weights[name] for name in tensors}, tmp_path / shard)
        held[shard] = (tmp_path / shard).read_bytes()
    index = {"weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}}
    held["model.safetensors.index.json"] = json.dumps(index).encode()
    # Another copy of the weights, in files that the index does not name.
    online.models["org/shards"] = {**held, "consolidated.safetensors": b"x"}
    assert load_model(loading.resolve_model("org/shards")).config.num_layers == 2
    assert {name for name in online.fetched if name.endswith(".safetensors")} == set(shards)
    # One shard with an index.
    single = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    online.models["org/one"] = {
        **{name: content for name, content in held.items() if not name.startswith("model-")},
        "model-00001-of-00001.safetensors": files["model.safetensors"],
        "model.safetensors.index.json": json.dumps(single).encode(),
    }
    assert load_model(loading.resolve_model("org/one")).config.num_layers == 2


def test_a_quantised_model_is_fetched_with_the_files_that_it_lists(online, tiny_ternary, tmp_path):
    folder = tmp_path / "quantised"
    checkpoint.save(tiny_ternary, chat_tokenizer(), folder, Recipe(), {})
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    online.models["org/quantised"] = {**files, "README.md": b"x", "model.safetensors": b"x"}
    model, tokenizer = loading.load("org/quantised")
    assert set(online.fetched) <= set(files)  # of equal files, one is enough
    assert tokenizer.chat_template
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(tiny_ternary), strict=True):
        np.testing.assert_array_equal(one, other)


def test_gguf_files_are_named_unless_there_is_but_one(online):
    online.models["org/gguf"] = {"tiny-Q8_0.gguf": b"GGUF", "README.md": b"x"}
    path = loading.resolve_model("org/gguf")
    assert (path.name, path.read_bytes()) == ("tiny-Q8_0.gguf", b"GGUF")
    assert loading.describe_model(path)["name"] == "org/gguf:tiny-Q8_0.gguf"
    split = {f"big-0000{i}-of-00003.gguf": b"GGUF%d" % i for i in (1, 2, 3)}
    online.models["org/split"] = split
    online.fetched.clear()
    assert loading.resolve_model("org/split").name == "big-00001-of-00003.gguf"
    assert set(online.fetched) == set(split)
    online.models["org/two"] = {"a.gguf": b"GGUFa", "b.gguf": b"GGUFb"}
    assert refusal("org/two") == (
        "org/two: holds several GGUF files; name one: org/two:a.gguf, org/two:b.gguf"
    )
    assert loading.resolve_model("org/two:b.gguf").name == "b.gguf"
    assert refusal("org/two:c.gguf") == "org/two: has no file c.gguf: a.gguf, b.gguf"
    online.models["org/bin"] = {"pytorch_model.bin": b"x"}
    assert "holds neither model.safetensors" in refusal("org/bin")


def test_no_access_and_wrong_names_are_one_line_with_what_to_do(online, files, monkeypatch):
    assert "the hub has no such model; or it is private, then log in with" in refusal("org/nothing")
    online.models["org/tiny"] = files
    assert refusal("org/tiny@v9") == "org/tiny@v9: the model has no revision 'v9'"
    online.gated.add("org/tiny")
    assert "org/tiny: is gated; accept its terms" in refusal("org/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    assert loading.resolve_model("org/tiny").name == COMMIT


def test_offline_the_cache_is_enough_and_what_it_lacks_is_named(online, files, monkeypatch):
    online.models["org/tiny"] = files
    online.models["org/gguf"] = {"tiny-Q8_0.gguf": b"GGUF", "README.md": b"x"}
    path, only = loading.resolve_model("org/tiny"), loading.resolve_model("org/gguf")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert loading.resolve_model("org/tiny") == path
    assert loading.resolve_model("org/gguf") == only
    assert refusal("org/other") == (
        "org/other: is no folder here, is not in the hub's cache, and HF_HUB_OFFLINE is set"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert loading.resolve_model("org/tiny") == path
    assert refusal("org/other").endswith("and the hub cannot be reached")
    assert refusal("org/other:a.gguf").endswith("and the hub cannot be reached")


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/na.me-1_b@refs/pr/1", ("org/na.me-1_b", "refs/pr/1", None)),
        ("org/name:sub/a.gguf", ("org/name", None, "sub/a.gguf")),
        ("org/name@main:a.gguf", ("org/name", "main", "a.gguf")),
    ],
)
def test_names_of_the_hub(name, parsed):
    assert hub.parse(name) == parsed


@pytest.mark.parametrize(
    "name",
    ["name", "a/b/c", "./a", "../a", "/a/b", "~/a", "a/", "a/b:c.bin", "a b/c", "-a/b", "a/b@", "a\0/b"],
)
def test_what_is_no_name_of_the_hub(name):
    assert hub.parse(name) is None


def test_a_slip_in_a_path_asks_no_hub(online, tmp_path):
    (tmp_path / "models").mkdir()
    assert refusal("models/nothing") == (
        "model 'models/nothing': models has none of that name; models/nothing@main would ask the hub"
    )
    assert not online.fetched
