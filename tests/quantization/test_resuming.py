"""A model in files comes to the same folder, a few blocks at a time, and so does interrupted work that goes on."""

import dataclasses
import shutil
import threading
import weakref

import jax
import numpy as np
import pytest

from twla_jax.core import kotms
from twla_jax.core.settings import WeightSettings
from twla_jax.errors import TwlaError
from twla_jax.models.layers import replace
from twla_jax.models.stored_layers import StoredLayers, in_files
from twla_jax.quantization import block, memory, pipeline
from twla_jax.quantization.snapshots import Snapshots
from twla_jax.storage import checkpoint, folders

from helpers import tiny
from helpers.tiny import assert_same

RECIPE, WINDOWS = tiny.RECIPE, tiny.WINDOWS


def save(model, folder):
    """Every file of the model's folder by name, once it is written."""
    checkpoint.save(model, None, folder, RECIPE, {"figures": 1})
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folders.files(folder)}


@pytest.fixture(scope="module")
def stored(model):
    """The same model with its matrices elsewhere, each layer read when it is asked for."""
    kernels = {
        f"blocks.{name}.kernel": getattr(model.blocks, name).kernel.get_value()
        for site in model.sites
        for name in site.linears
    }
    return replace(
        model,
        {
            path: StoredLayers(lambda index, array=array: array[index].copy(), array.shape, array.dtype)
            for path, array in kernels.items()
        },
    )


@pytest.fixture(scope="module")
def streamed(stored, tmp_path_factory):
    """The model in files, quantised; its packed blocks stay in the working folder."""
    work = tmp_path_factory.mktemp("work")
    return pipeline.quantize_blocks(stored, WINDOWS, RECIPE.quantization, work_dir=work, progress=False)


def test_a_model_in_files_gives_the_same_folder_byte_for_byte(quantised, streamed, tmp_path):
    assert in_files(streamed[0])
    assert figures_of(streamed) == figures_of(quantised)
    files = save(streamed[0], tmp_path / "streamed")
    assert files == save(quantised[0], tmp_path / "whole")
    assert_same(checkpoint.load(tmp_path / "streamed")[0], checkpoint.load(tmp_path / "whole")[0])


def figures_of(result):
    return result[1]["sites"]


def test_no_more_than_three_blocks_of_a_model_in_files_are_in_memory(stored, tmp_path, monkeypatch):
    alive, most, lock, read = {}, [], threading.Lock(), StoredLayers.__getitem__

    def counted(self, index):
        array = read(self, index)
        with lock:
            alive[id(array)] = array.nbytes
            most.append(sum(alive.values()))
        weakref.finalize(array, alive.pop, id(array), None)
        return array

    monkeypatch.setattr(StoredLayers, "__getitem__", counted)
    pipeline.quantize_blocks(stored, WINDOWS, RECIPE.quantization, work_dir=tmp_path, progress=False)
    kernels = [leaf for leaf in jax.tree.leaves(stored.blocks) if isinstance(leaf, StoredLayers)]
    block = sum(kernel.nbytes for kernel in kernels) // stored.config.num_layers
    assert block <= max(most) <= 3 * block
    assert block == memory.block_bytes(stored, 4)


@pytest.fixture
def no_skip(monkeypatch):
    """A disk that is faster than these small blocks."""
    keep = Snapshots.keep_streams
    monkeypatch.setattr(
        Snapshots,
        "keep_streams",
        lambda self, *args: (keep(self, *args), self._streams and self._streams.result()),
    )


@pytest.mark.usefixtures("no_skip")
@pytest.mark.parametrize("finished", [1, 2])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    model, stored, quantised, tmp_path, monkeypatch, finished
):
    done, quantize_block = [], block.quantize_block

    def interrupted(*args):
        if len(done) == finished:
            raise KeyboardInterrupt
        done.append(1)
        return quantize_block(*args)

    monkeypatch.setattr(pipeline, "quantize_block", interrupted)
    held = model if finished == 1 else stored
    options = {"work_dir": tmp_path / "work", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize_blocks(held, WINDOWS, RECIPE.quantization, **options)
    done.clear()
    finished = 3
    monkeypatch.setattr(kotms, "fit_rotation", None)  # rotations are not fitted again
    resumed = pipeline.quantize_blocks(held, WINDOWS, RECIPE.quantization, **options)
    assert len(done) == (2 if held is model else 1)  # nor a finished block quantised
    assert save(resumed[0], tmp_path / "resumed") == save(quantised[0], tmp_path / "whole")
    assert figures_of(resumed) == figures_of(quantised)
    # Interrupted in a later stage, it goes on from what is finished.
    done.clear()
    again = pipeline.quantize_blocks(held, WINDOWS, RECIPE.quantization, **options)
    assert not done
    assert_same(jax.tree.map(np.asarray, again[0]), quantised[0])
    assert figures_of(again) == figures_of(quantised)


@pytest.mark.usefixtures("no_skip")
def test_a_kill_while_the_stream_is_written_loses_the_block_in_hand_alone(
    model, quantised, tmp_path, monkeypatch
):
    """The streams before block 1 are on the disk, those before block 2 never come to be whole."""
    savez, work = np.savez, tmp_path / "work"

    def killed(file, **arrays):
        if arrays.get("layer") == 2:
            file.write(b"half of it")
            shutil.copytree(work, tmp_path / "killed")
        savez(file, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", killed)
        pipeline.quantize_blocks(model, WINDOWS, RECIPE.quantization, work_dir=work, progress=False)
    done, quantize_block = [], block.quantize_block
    monkeypatch.setattr(pipeline, "quantize_block", lambda *args: done.append(1) or quantize_block(*args))
    resumed, _ = pipeline.quantize_blocks(
        model, WINDOWS, RECIPE.quantization, work_dir=tmp_path / "killed", progress=False
    )
    assert len(done) == 2
    assert_same(resumed, quantised[0])


def test_work_on_other_settings_is_refused(model, tmp_path):
    (tmp_path / "work").mkdir()
    pipeline._open_work_dir(tmp_path / "work", model, WINDOWS, RECIPE.quantization)
    pipeline._open_work_dir(tmp_path / "work", model, WINDOWS, RECIPE.quantization)
    other = dataclasses.replace(RECIPE, weights=WeightSettings(group_size=8))
    for windows, recipe in ((WINDOWS[:2], RECIPE), (WINDOWS, other)):
        with pytest.raises(TwlaError, match="another model, text or recipe"):
            pipeline.quantize_blocks(
                model, windows, recipe.quantization, work_dir=tmp_path / "work", progress=False
            )
