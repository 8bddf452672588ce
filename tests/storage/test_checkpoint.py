"""A saved model comes back as it was, alone; a damaged folder and an unfit place are refused in one line."""

import errno
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twla_jax.core import packing, quantizers
from twla_jax.core.settings import IntegerSettings, TwoPlaneSettings, WeightSettings
from twla_jax.errors import TwlaError
from twla_jax.recipe import Recipe
from twla_jax.storage import accounting, checkpoint
from twla_jax.storage.manifest import array_name

from helpers.plain_planes import plain_model

REPORT = {"perplexity": 12.5, "corpus": {"name": "pydoc"}}


@pytest.fixture
def saved(tiny_ternary, tmp_path):
    folder = tmp_path / "models" / "out"
    checkpoint.save(tiny_ternary, None, folder, Recipe(), REPORT)
    return folder


def leaves(model):
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


@pytest.mark.smoke
def test_every_leaf_and_the_logits_come_back_exactly(tiny_ternary, saved):
    model, tokenizer, info = checkpoint.load(saved)
    before, after = leaves(tiny_ternary), leaves(model)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert leaf.dtype == after[name].dtype, name
        np.testing.assert_array_equal(leaf, after[name], err_msg=name)
    tokens = jnp.arange(14).reshape(2, 7)
    np.testing.assert_array_equal(jax.jit(tiny_ternary.__call__)(tokens), jax.jit(model.__call__)(tokens))
    assert tokenizer is None
    assert (info.recipe, info.report, info.config) == (Recipe(), REPORT, tiny_ternary.config)


def test_planes_without_mu_load_as_those_of_earlier_versions_with_zeros_for_it(tmp_path):
    loaded = {}
    for name, offset in (("new", None), ("old", 0.0)):
        checkpoint.save(plain_model(128, offset=offset), None, tmp_path / name, Recipe(), {})
        loaded[name], _, _ = checkpoint.load(tmp_path / name)
    assert not list((tmp_path / "new" / "params").glob("*.mu"))
    assert loaded["new"].blocks.q.kernel.get_value().mu is None
    assert not np.asarray(loaded["old"].blocks.q.kernel.get_value().mu).any()
    tokens = jnp.arange(14).reshape(2, 7)
    logits = [jax.jit(model.__call__)(tokens) for model in loaded.values()]
    np.testing.assert_array_equal(*logits)
    # saved again, each is as it was
    checkpoint.save(loaded["old"], None, tmp_path / "again", Recipe(), {})
    tensors, before = (checkpoint.read_manifest(tmp_path / name)["tensors"] for name in ("again", "old"))
    assert tensors == before
    assert tensors["blocks.q.kernel"]["arrays"].keys() == {"codes", "alpha", "mu"}


def test_codes_lie_on_the_disk_at_five_trits_a_byte_uncompressed(tiny_ternary, saved):
    chunk = saved / "params" / "blocks.q.kernel.codes" / "0.0.0"
    assert chunk.stat().st_size == 3 * 42 * -(-42 // 5)
    # and a tied embedding once, in the dtype it came in
    assert (saved / "params" / "embed" / "0.0").stat().st_size == 97 * 42 * 2
    assert not list((saved / "params").glob("head*"))


def test_the_compute_dtype_is_the_callers_and_weights_keep_theirs(saved):
    model, _, _ = checkpoint.load(saved, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    assert model.embed.get_value().dtype == jnp.float16


def test_nothing_is_left_beside_the_folder(saved):
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("file", ["params/blocks.down.kernel.alpha/0.0.0", "report.json", "twla.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_folder_is_refused_naming_the_file(saved, file, damage):
    path = saved / file
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(TwlaError, match=path.name) as caught:
        checkpoint.load(saved)
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_refused(saved):
    manifest = json.loads((saved / "twla.json").read_text())
    manifest["format_version"] = 99
    manifest["checksum"] = checkpoint.checksum(manifest)
    (saved / "twla.json").write_text(json.dumps(manifest))
    with pytest.raises(TwlaError, match="format 99"):
        checkpoint.load(saved)


def test_a_non_empty_place_needs_overwrite_and_only_models_are_overwritten(tiny_ternary, saved, tmp_path):
    with pytest.raises(TwlaError, match="--overwrite"):
        checkpoint.save(tiny_ternary, None, saved, Recipe(), REPORT)
    checkpoint.save(tiny_ternary, None, saved, Recipe(name="second"), REPORT, overwrite=True)
    assert checkpoint.load(saved)[2].recipe.name == "second"
    assert [path.name for path in saved.parent.iterdir()] == ["out"]

    diary = tmp_path / "diary"
    diary.mkdir()
    (diary / "monday.txt").write_text("dear diary")
    with pytest.raises(TwlaError, match="holds no quantised model"):
        checkpoint.save(tiny_ternary, None, diary, Recipe(), REPORT, overwrite=True)
    with pytest.raises(TwlaError, match="is a file"):
        checkpoint.save(tiny_ternary, None, diary / "monday.txt", Recipe(), REPORT, overwrite=True)
    assert (diary / "monday.txt").read_text() == "dear diary"


def test_a_disk_known_to_be_too_small_is_refused_before_writing(tiny_ternary, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(TwlaError, match="MB left"):
        checkpoint.save(tiny_ternary, None, tmp_path / "out", Recipe(), REPORT)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_writing_leaves_the_old_model(tiny_ternary, saved, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(TwlaError, match="no space left on device; nothing was written"):
        checkpoint.save(tiny_ternary, None, saved, Recipe(name="second"), REPORT, overwrite=True)
    assert [path.name for path in saved.parent.iterdir()] == ["out"]
    assert checkpoint.load(saved)[2].recipe.name == "w1.58-g128"


def test_a_folder_without_a_model_is_told_apart(tmp_path):
    assert not checkpoint.is_checkpoint(tmp_path)
    with pytest.raises(TwlaError, match=r"not a quantised model \(no twla.json\)"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "recipe",
    [
        WeightSettings(quantizer=TwoPlaneSettings(), group_size=16),
        WeightSettings(quantizer=IntegerSettings(bits=3), group_size=16),
    ],
    ids=["two-planes", "integers"],
)
def test_other_weights_come_back_exactly_and_are_counted_to_the_byte(tiny_ternary, recipe, tmp_path):
    rng, levels = np.random.default_rng(1), quantizers.quantizer(recipe)
    for name in (name for site in tiny_ternary.sites for name in site.linears):
        linear = getattr(tiny_ternary.blocks, name)
        layers, n, m = linear.kernel.get_value().shape
        scales = [rng.uniform(0.5, 1, (layers, n, -(-m // 16))).astype(np.float32) for _ in range(3)]
        if isinstance(recipe.quantizer, TwoPlaneSettings):
            codes = rng.integers(-4, 5, (layers, n, m))
        else:
            codes = rng.integers(0, 8, (layers, n, m))
            scales = [scales[0], np.floor(8 * scales[1] - 1e-3)]
        packed = levels.pack(jnp.asarray(codes, jnp.float32), tuple(map(jnp.asarray, scales)), 16)
        linear.kernel = nnx.Param(packed)
    checkpoint.save(tiny_ternary, None, tmp_path / "out", Recipe(weights=recipe), REPORT)
    model, _, info = checkpoint.load(tmp_path / "out")
    before, after = leaves(tiny_ternary), leaves(model)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert leaf.dtype == after[name].dtype, name
        np.testing.assert_array_equal(leaf, after[name], err_msg=name)
    assert info.recipe.weights == recipe
    account = accounting.account(tmp_path / "out")
    assert account["bytes_accounted"] == account["bytes_on_disk"]
    rows = {42: 3 * (42 + 14 + 14 + 42 + 78 + 78), 78: 3 * 42}
    if isinstance(recipe.quantizer, TwoPlaneSettings):
        sizes = {m: (2 * -(-m // 5), 5 * -(-m // 16)) for m in rows}
    else:
        sizes = {m: (-(-3 * m // 8), 2 * -(-m // 16) + -(-3 * -(-m // 16) // 8)) for m in rows}
    for place, part in enumerate(("codes", "scales_and_offsets")):
        assert account["breakdown"][part] == sum(count * sizes[m][place] for m, count in rows.items())


def test_plain_orbax_and_numpy_restore_it_as_the_documentation_says(tiny_ternary, saved, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    by_numpy, v0, v1 = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert not any("twla_jax" in code for code in (by_numpy, v0, v1))
    monkeypatch.chdir(saved.parent)
    names: dict = {}
    exec(by_numpy.replace("smollm2-w1.58", "out"), names)
    q = tiny_ternary.first_kernel
    np.testing.assert_array_equal(names["T"], packing.unpack(q.codes, q.in_features) - 1.0)
    stored = json.loads((saved / "twla.json").read_text())["tensors"]
    expected = {
        array_name(name, part): (saved / "params" / array_name(name, part), array)
        for name, entry in stored.items()
        for part, array in entry["arrays"].items()
    }
    for code in (v0, v1):
        exec(code, names)
        arrays = names["arrays"]
        assert arrays.keys() == expected.keys()
        for name, (folder, array) in expected.items():
            (chunk,) = (path for path in folder.iterdir() if path.name[0] != ".")
            assert np.asarray(arrays[name]).tobytes() == chunk.read_bytes()
            assert list(arrays[name].shape) == array["shape"]
