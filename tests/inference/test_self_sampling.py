"""Text that a model samples itself: what it predicts, drawn again from its seed, kept apart by use."""

import dataclasses

import numpy as np
import pytest

import twla_jax
from twla_jax.errors import TwlaError
from twla_jax.inference import self_sampling
from twla_jax.inference.self_sampling import continue_windows, sample_text
from twla_jax.models.io import readers
from twla_jax.models.layers import replace
from twla_jax.recipe import AllocationSettings, CalibrationSettings, Recipe
from twla_jax.refinement_settings import EndToEndSettings, RefineSettings
from twla_jax.storage import resume
from twla_jax.text import corpora, recipe_windows
from twla_jax.text.sampled import SampledText


@pytest.fixture(scope="module")
def model(stories):
    return readers.load_model(stories)


@pytest.fixture(scope="module")
def rows(model):
    return sample_text(model, 20, 64, progress=False)


def test_the_text_begins_with_bos_and_is_what_the_model_predicts(model, rows):
    assert rows.shape == (20, 64)
    assert rows.dtype == np.int32
    assert (rows[:, 0] == model.config.bos_token_id).all()
    assert len({row.tobytes() for row in rows}) == 20
    shuffled = np.random.default_rng(0).permuted(rows, axis=1)
    nll, of_shuffled = (twla_jax.evaluate(model, text, progress=False)["nll"] for text in (rows, shuffled))
    # Samples of a distribution score its entropy, far below what chance or other orders do.
    assert nll < 0.6 * of_shuffled
    assert nll < 0.6 * np.log(model.config.vocab_size)


def test_the_seed_gives_the_text_again_however_much_of_it(model, rows):
    np.testing.assert_array_equal(sample_text(model, 9, 64, progress=False), rows[:9])
    assert (sample_text(model, 8, 64, seed=1, progress=False) != rows[:8]).any()


def test_a_model_without_bos_begins_with_random_tokens(model):
    other = replace(model, config=dataclasses.replace(model.config, bos_token_id=None))
    first = sample_text(other, 8, 64, progress=False)[:, 0]
    assert len(set(first.tolist())) > 4


def test_an_interrupted_sampling_goes_on(model, rows, tmp_path, monkeypatch):
    sampled, sample = [], self_sampling._sample_batch

    def interrupted(model, start, seq_len, seed, index):
        if sampled == [0, 1]:
            sampled.append("stop")
            raise KeyboardInterrupt
        sampled.append(index)
        return sample(model, start, seq_len, seed, index)

    monkeypatch.setattr(self_sampling, "_sample_batch", interrupted)
    options = {"work_dir": tmp_path / "out.partial" / "self", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        sample_text(model, 20, 64, **options)
    np.testing.assert_array_equal(sample_text(model, 20, 64, **options), rows)
    assert sampled == [0, 1, "stop", 2]
    with pytest.raises(TwlaError, match="unfinished work on another"):
        sample_text(model, 20, 64, seed=1, **options)
    # The folder above serves the stages that follow, but not where it holds anything else.
    resume.WorkDir(tmp_path / "out.partial", "quantise")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(TwlaError, match="holds no unfinished work"):
        resume.WorkDir(tmp_path / "mine", "quantise")


@pytest.fixture(scope="module")
def begun():
    """Windows of random tokens, which no model would write; 20 pieces, of two batches and a half of another."""
    return np.random.default_rng(0).integers(3, 500, (20, 64)).astype(np.int32)


@pytest.fixture(scope="module")
def continued(model, begun):
    return continue_windows(model, begun, progress=False)


def test_windows_are_continued_from_their_own_beginnings_by_what_the_model_predicts(model, begun, continued):
    assert continued.shape == begun.shape
    np.testing.assert_array_equal(continued[:, :32], begun[:, :32])
    assert (continued[:, 32:] == begun[:, 32:]).mean() < 0.1
    nll = [twla_jax.evaluate(model, text[:, 32:], progress=False)["nll"] for text in (continued, begun)]
    assert nll[0] < 0.6 * nll[1]


def test_long_windows_are_continued_in_pieces(model, begun, continued, monkeypatch):
    monkeypatch.setattr(self_sampling, "_PIECE", 64)
    long = begun.reshape(10, 128)
    np.testing.assert_array_equal(continue_windows(model, long, progress=False), continued.reshape(10, 128))
    # What does not fill a piece stays part of the last one.
    longer = np.concatenate([long, begun[:10, :2]], axis=1)
    assert (continue_windows(model, longer, progress=False)[:, 65:97] == longer[:, 65:97]).all()


def test_windows_that_there_is_no_time_for_stay_as_they_are(model, begun, continued, tmp_path, monkeypatch):
    monkeypatch.setattr(self_sampling.time, "perf_counter", iter(range(100)).__next__)
    options = {"work_dir": tmp_path / "own", "progress": False}
    # A second passes between two looks at the clock.
    some = continue_windows(model, begun, seconds=1, **options)
    np.testing.assert_array_equal(some[:8], continued[:8])
    np.testing.assert_array_equal(some[8:], begun[8:])
    # The same again, however much time there is now.
    np.testing.assert_array_equal(continue_windows(model, begun, seconds=50, **options), some)


def test_every_use_has_rows_of_its_own():
    recipe = Recipe(
        refine=RefineSettings(end_to_end=EndToEndSettings(steps=3, batch=2)),
        calibration=CalibrationSettings(corpus="self", windows=4, seq_len=8),
        allocation=AllocationSettings(windows=2, seq_len=5),
    )
    text = SampledText(rows=np.arange(12 * 8, dtype=np.int32).reshape(12, 8), seed=0, held_out=2)
    assert recipe_windows.count(recipe) == 12
    seen, more = recipe_windows.seen_windows(text, recipe)
    held_out, shared = recipe_windows.held_out_windows(text, recipe)
    assert (seen.shape, more.shape, held_out.shape, shared) == ((4, 8), (6, 8), (2, 5), 0.0)
    used = np.concatenate([seen.ravel(), more.ravel(), held_out.ravel()])
    assert len(set(used.tolist())) == used.size
    wide = dataclasses.replace(recipe, allocation=AllocationSettings(windows=2, seq_len=9))
    many = dataclasses.replace(recipe, allocation=AllocationSettings(windows=3))
    for refused in (wide, many):
        with pytest.raises(TwlaError, match="has 2 of 8 that no calibration saw"):
            recipe_windows.held_out_windows(text, refused)


@pytest.mark.parametrize(
    ("name", "split"), [("self", "evaluation"), ("self", "calibration"), ("self+pydoc", "calibration")]
)
def test_the_models_own_text_is_no_corpus(name, split):
    with pytest.raises(TwlaError, match="'self' is text that the model samples itself"):
        corpora.load_corpus(name, split)
