"""Block-wise refinement brings each block's output nearer to the original's, compiles once and resumes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.models.sites import set_activation_bits
from twla_jax.refinement import blockwise
from twla_jax.refinement_settings import BlockRefinementSettings
from twla_jax.storage import resume

from helpers.compiled import compiled_programs
from helpers.tiny import WINDOWS

REFINE = BlockRefinementSettings(batch=4, code_rate=1e-2, scale_rate=5e-3, dtype="float32", steps=60)


@pytest.fixture(scope="module")
def teacher(tiny_model):
    return jax.tree.map(jnp.asarray, tiny_model)


@pytest.fixture(scope="module")
def student(tiny_quantized):
    return jax.tree.map(jnp.asarray, set_activation_bits(tiny_quantized[0], 4))


def outputs(model):
    """The residual stream after the last block, in float64."""
    model = jax.tree.map(jnp.asarray, model)
    x = model.embed_tokens(WINDOWS)
    for index in range(model.config.num_layers):
        block = jax.tree.map(lambda leaf, i=index: leaf[i], model.blocks)
        x = block(x, model.context(WINDOWS.shape[1]).layer(index))
    return np.asarray(x, np.float64)


def error(student, teacher):
    got, wanted = outputs(student), outputs(teacher)
    return (np.square(got - wanted).sum(-1) / np.square(wanted).sum(-1)).mean()


def test_loss_is_the_relative_error_of_each_token():
    rng = np.random.default_rng(1)
    got, target = (rng.normal(size=(2, 3, 5)) * 10.0 ** np.arange(3)[:, None] for _ in range(2))
    expected = (np.square(got - target).sum(-1) / np.square(target).sum(-1)).mean()
    assert float(blockwise.relative_error(got, target)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2])
def test_blocks_learn_with_one_compilation_and_keep_the_format(student, teacher, window):
    recipe = dataclasses.replace(REFINE, window=window)
    blockwise._fit.clear_cache()
    refined, figures = blockwise.refine_blocks(student, teacher, WINDOWS, recipe, progress=False)
    assert compiled_programs(blockwise._fit) == 1
    assert len(figures["loss"]) == 4 - window
    assert all(last < first for first, last in figures["loss"])
    assert 0 < figures["flipped"] < 0.5
    assert error(refined, teacher) < 0.9 * error(student, teacher)
    assert jax.tree.structure(refined) == jax.tree.structure(student)
    for before, after in zip(jax.tree.leaves(student), jax.tree.leaves(refined), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


def test_an_interrupted_stage_goes_on_to_the_same_result(student, teacher, tmp_path, monkeypatch):
    recipe = dataclasses.replace(REFINE, steps=4, mix=0.5, dtype="bfloat16")
    whole, figures = blockwise.refine_blocks(student, teacher, WINDOWS, recipe, progress=False)
    save, taken = resume.WorkDir.save, []

    def interrupted(self, name, arrays):
        save(self, name, arrays)
        taken.append(len(arrays["losses"]))
        if taken == [1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume.WorkDir, "save", interrupted)
    arguments = (student, teacher, WINDOWS, recipe)
    with pytest.raises(KeyboardInterrupt):
        blockwise.refine_blocks(*arguments, work_dir=tmp_path / "work", progress=False)
    resumed, again = blockwise.refine_blocks(*arguments, work_dir=tmp_path / "work", progress=False)
    assert taken == [1, 2, 3]
    assert again == figures
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
