"""Runs the stages of a quantisation in order: the Python API, the command line and the ablation share them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from twla_jax.allocation import choice, measurement
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.jobs import domain_check
from twla_jax.models import Decoder, sites
from twla_jax.models.arguments import checked_tokens, require_full_precision, require_settings
from twla_jax.models.folded_rotation import fold_rotation
from twla_jax.quantization import pipeline
from twla_jax.quantization.embedding import quantize_embeddings
from twla_jax.recipe import Recipe
from twla_jax.refinement import blockwise, clip_training, end_to_end
from twla_jax.reports.run import Phases
from twla_jax.storage import resume
from twla_jax.text import recipe_windows
from twla_jax.text.corpora import Corpus
from twla_jax.text.recipe_windows import DrawnText, Text
from twla_jax.text.sampled import SampledText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What every stage may read.

    Attributes:
      teacher: the full-precision model.
      text: the windows of each stage.
      recipe: the settings of each stage.
      rotations: as `quantize_blocks` takes them; None fits them.
      work_dir: finished work is kept here, each stage's in a place of its own; None keeps none.
      mesh: with axes `data` and `model`, which every stage splits its work over.
      progress: bars on stderr.
    """

    teacher: Decoder
    text: DrawnText
    recipe: Recipe
    rotations: Mapping[str, KroneckerRotation] | None = None
    work_dir: Path | None = None
    mesh: jax.sharding.Mesh | None = None
    progress: bool = True

    def options(self, place: str) -> dict[str, Any]:
        """Return the options that all stages have, with the place of one stage's unfinished work."""
        return {"work_dir": self.work_dir and self.work_dir / place, "progress": self.progress}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a quantisation.

    Attributes:
      name: what reports call it.
      wanted: whether a recipe names it.
      run: the model after it, and JSON-ready figures by name, from the model before it.
    """

    name: str
    wanted: Callable[[Recipe], bool]
    run: Callable[[Decoder, Work], tuple[Decoder, dict[str, Any]]]


def _quantize(model: Decoder, work: Work) -> tuple[Decoder, dict[str, Any]]:
    model, figures = pipeline.quantize_blocks(
        model,
        work.text.calibration,
        work.recipe.quantization,
        rotations=work.rotations,
        mesh=work.mesh,
        **work.options(""),
    )
    if work.recipe.embedding:
        model = quantize_embeddings(model, work.recipe.embedding)
    return model, {"layers": figures}


def _refine_blocks(model: Decoder, work: Work) -> tuple[Decoder, dict[str, Any]]:
    settings = work.recipe.refine.blocks
    assert settings is not None
    model, figures = blockwise.refine_blocks(
        model, work.teacher, work.text.calibration, settings, mesh=work.mesh, **work.options("blocks")
    )
    return model, {"refine_blocks": figures}


def _refine(model: Decoder, work: Work) -> tuple[Decoder, dict[str, Any]]:
    settings = work.recipe.refine.end_to_end
    assert settings is not None
    refined, figures = end_to_end.refine(
        model, work.teacher, work.text.refinement, settings, mesh=work.mesh, **work.options("refine")
    )
    texts = domain_check.domain_windows(work.text)
    if texts and figures["kept"]:
        better, by_domain = domain_check.better_by_domain(
            model, refined, work.teacher, texts, settings.dtype, mesh=work.mesh, progress=work.progress
        )
        figures |= {"kept": better is refined, "by_domain": by_domain}
    return refined if figures["kept"] else model, {"refine": figures}


def _train_clips(model: Decoder, work: Work) -> tuple[Decoder, dict[str, Any]]:
    settings, text = work.recipe.refine.clips, work.text
    assert settings is not None
    windows = text.refinement if len(text.refinement) else text.calibration
    model, figures = clip_training.train_clips(
        model, work.teacher, windows, settings, mesh=work.mesh, **work.options("clips")
    )
    return model, {"train_clips": figures}


def _allocate(model: Decoder, work: Work) -> tuple[Decoder, dict[str, Any]]:
    measured = measurement.prepare(model, work.text, work.recipe, mesh=work.mesh, **work.options("ila_amp"))
    allocated, figures = choice.choose(measured, progress=work.progress)
    # Weights stay where they were, on the host or in files, rather than on the devices of all hosts.
    model = sites.with_input_clips(model, sites.input_clips(allocated))
    model = sites.with_input_bits(model, sites.input_bits(allocated))
    return model, {"allocation": figures, "tables": measured.tables}


# Of the weights; then of the bits of their inputs, which are chosen on the finished weights.
WEIGHT_STAGES = (
    Stage("quantise", lambda recipe: True, _quantize),
    Stage("refine block by block", lambda recipe: recipe.refine.blocks is not None, _refine_blocks),
    Stage("refine", lambda recipe: recipe.refine.end_to_end is not None, _refine),
    Stage("train clips", lambda recipe: recipe.refine.clips is not None, _train_clips),
)
BIT_STAGES = (Stage("allocate bits", lambda recipe: recipe.allocation.budget > 0, _allocate),)


def run_stages(
    stages: Sequence[Stage], model: Decoder, work: Work, phases: Phases | None = None
) -> tuple[Decoder, dict[str, Any]]:
    """Run those stages that the recipe names, in order; return the model after them and their figures by name.

    Args:
      stages: of `WEIGHT_STAGES` and `BIT_STAGES`.
      model: full precision for the first stage, quantised for the others.
      work: what the stages read.
      phases: where each stage is timed under its name.
    """
    phases = phases or Phases(verbose=False)
    figures: dict[str, Any] = {}
    for stage in stages:
        if stage.wanted(work.recipe):
            with phases(stage.name):
                model, found = stage.run(model, work)
            figures |= found
    return model, figures


def prepared(model: Decoder, recipe: Recipe) -> Decoder:
    """Return the full-precision model as the stages take it: with rotations folded into it, where the recipe says so.

    Raises:
      TwlaError: a family whose stream cannot be rotated so.
    """
    return model if recipe.folded_rotation is None else fold_rotation(model, recipe.folded_rotation)


@resume.keeps_work_dir
def quantize(
    model: Decoder,
    text: Text,
    recipe: Recipe,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    work_dir: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> tuple[Decoder, dict[str, Any]]:
    """Quantise a model by every stage that the recipe names; return the quantised model and the stages' figures.

    Args:
      model: full precision; left as it is. Host (numpy) parameters go to the device one block at a time.
      text: a corpus with its `tokenizer`, or tokens `[t]`, from which windows are drawn as the recipe's `calibration`
        says; or windows `[w, s]` themselves, of which the last are held out for the allocation of bits, those before
        refine and all others calibrate, as many as the recipe's `allocation` and `refine` name.
      recipe: from `load_recipe`, or built in Python.
      tokenizer: of the model, where the text is a corpus.
      work_dir: finished work is kept here; a later call with the same arguments goes on from it.
      mesh: with axes `data` and `model`: windows are split over `data`, parameters as `sharding.shardings` says.
      progress: bars with an estimate of the time left, on stderr.

    Returns:
      The model, and JSON-ready figures: `layers` (see `quantize_blocks`), and of the stages that ran `refine_blocks`,
      `refine`, `train_clips`, `allocation` (see `allocate_bits`) and its `tables`; `seconds` by stage.

    Raises:
      TwlaError: too little text for a stage of the recipe, or what a stage refuses. Nothing is left out silently.
    """
    require_full_precision(model)
    require_settings(recipe, Recipe, "recipe")
    if not isinstance(text, Corpus | SampledText):
        text = checked_tokens(text, model.config, "text", ranks=(1, 2))
    model = prepared(model, recipe)
    allocates = recipe.allocation.budget > 0
    drawn = recipe_windows.draw(text, recipe, tokenizer, model.config.vocab_size, held_out=allocates)
    work = Work(
        teacher=model,
        text=drawn,
        recipe=recipe,
        work_dir=None if work_dir is None else Path(work_dir),
        mesh=mesh,
        progress=progress,
    )
    phases = Phases(verbose=False)
    quantized, figures = run_stages((*WEIGHT_STAGES, *BIT_STAGES), model, work, phases)
    return quantized, {**figures, "seconds": phases.seconds}
