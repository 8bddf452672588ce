"""Runs the whole job: read a model, calibrate, quantise, check the result, save it with its report."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax import hosts
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.errors import TwlaError
from twla_jax.evaluation.domains import evaluate_domains, format_domains
from twla_jax.evaluation.scoring import evaluate
from twla_jax.inference import self_sampling
from twla_jax.inference.generation import generate
from twla_jax.jobs import allocate_bits, places, stages
from twla_jax.jobs.loading import describe_model, kept_files, resolve_model
from twla_jax.models import Decoder
from twla_jax.models.config import check_length
from twla_jax.models.decoder import computing_in
from twla_jax.models.folded_rotation import folded_config
from twla_jax.models.io import readers
from twla_jax.models.io.tokenizer import as_json
from twla_jax.models.sites import set_activation_bits
from twla_jax.recipe import Recipe
from twla_jax.reports.run import Phases, environment, peak_memory
from twla_jax.storage import accounting, checkpoint, folders, resume
from twla_jax.text import corpora, recipe_windows, sampled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORK = ".partial"  # ending of the folder beside OUT that keeps what is finished
_PROMPT_TOKENS = 32  # that the sample of the check continues


@places.writes(work=WORK)
def quantize_to_folder(
    model_name: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    check_corpus: str | None = None,
    check_windows: int = 8,
    check_bits: Sequence[int] = (),
    sample_tokens: int = 32,
    allow_broken: bool = False,
    full_precision: Mapping[str, Any] | None = None,
    rotations: Mapping[str, KroneckerRotation] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantise a model into a folder that works alone; resume what an interrupted call left in `OUT.partial`.

    Args:
      model_name: what `load` takes, not yet quantised.
      recipe: with an allocation budget, the inputs get bits of their own, chosen on calibration text.
      out: folder to write; it appears only once everything, checks included, is done.
      dtype: what the model computes in.
      overwrite: replace a quantised model in `out`.
      check_corpus: whose evaluation text the result is checked on; None takes the calibration corpus where that is
        known by name, else `pydoc`.
      check_windows: windows of that text, of the recipe's length.
      check_bits: activation bits to report the perplexity at; empty takes the recipe's.
      sample_tokens: of the text that the model is checked by and that the report keeps; 0 leaves it out.
      allow_broken: keep a model that fails its check, as a baseline of few bits may.
      full_precision: `evaluation` of another report on the same model, whose figure of the original is taken where text
        and windows are the same too; None measures it.
      rotations: as `quantize_blocks` takes them.
      mesh: with axes `data` and `model`, which the stages and the evaluations split their work over. Of several hosts,
        with the devices of all: each makes this call, and the first one writes.
      progress: phases and bars on stderr.
    Returns:
      The report, as kept in `report.json`, with the folder's `accounting.account` under `size`.
    Raises:
      TwlaError: an input that cannot be used, or a quantised model that fails its check.
    """
    out = Path(out)
    phases = Phases(verbose=progress)
    with phases("read the model"):
        path = resolve_model(model_name)
        if checkpoint.is_checkpoint(path):
            raise TwlaError(f"{path}: is quantised already")
        seq_len = recipe.calibration.seq_len
        config = readers.read_config(path)
        check_length(max(seq_len, recipe.allocation.seq_len), config)
        if recipe.folded_rotation:
            folded_config(config)  # which refuses other families before anything is read
        own_text = recipe.calibration.corpus == corpora.SELF
        corpus = None if own_text else corpora.load_corpus(recipe.calibration.corpus, "calibration")
        check = corpora.load_corpus(check_corpus or _evaluation_name(recipe.calibration.corpus), "evaluation")
        # Asked for in float16, the block-quantised tensors of a GGUF file come in float16, which is as fine as they are
        # and half of float32's bytes, here and on the disk. Tensors stored as floats keep their own type.
        model, tokenizer = readers.read_model(path, dtype=jnp.float16, in_files=True)
        model = computing_in(model, dtype)
    work_dir = out.with_name(out.name + WORK)
    text = corpus or _sample_text(model, recipe, work_dir / corpora.SELF, phases, progress)
    with phases("tokenise the text"):
        vocab_size = model.config.vocab_size
        allocates = recipe.allocation.budget > 0
        drawn = recipe_windows.draw(text, recipe, tokenizer, vocab_size, held_out=allocates)
        check_tokens = corpora.first_windows(check, tokenizer, vocab_size, check_windows, seq_len)
    together = resume.fingerprint(
        {"config": model.config.to_dict(), "recipe": recipe.to_dict()}, [drawn.calibration, check_tokens]
    )
    hosts.require_same(together, "model, text or recipe")
    score = functools.partial(evaluate, tokens=check_tokens, mesh=mesh, progress=progress)
    known = _known_figures(full_precision, check, check_tokens)
    with phases("evaluate in full precision"):
        original = known or score(model)
    teacher = stages.prepared(model, recipe)
    work = stages.Work(
        teacher=teacher,
        text=drawn,
        recipe=recipe,
        rotations=rotations,
        work_dir=work_dir,
        mesh=mesh,
        progress=progress,
    )
    quantized, figures = stages.run_stages(stages.WEIGHT_STAGES, teacher, work, phases)
    by_domain: dict[str, Any] = {}
    if check.parts:
        with phases("compare with the original"):
            each = -(-check_windows // len(check.parts))
            texts = {
                part.name: corpora.first_windows(part, tokenizer, vocab_size, each, seq_len)
                for part in check.parts
            }
            by_domain = {
                "by_domain": evaluate_domains(quantized, texts, original=model, mesh=mesh, progress=progress)
            }
    del model
    with phases("evaluate the quantised model"):
        perplexity = {
            f"A{bits}": score(set_activation_bits(quantized, bits))["perplexity"]
            for bits in check_bits or [recipe.activations.bits]
        }
    extra = kept_files(path)
    if isinstance(text, sampled.SampledText):
        extra[sampled.FILE] = sampled.dump(text, len(drawn.calibration))
    quantized, allocated = stages.run_stages(stages.BIT_STAGES, quantized, work, phases)
    if allocated:
        extra[allocate_bits.TABLES] = allocate_bits.dump_tables(allocated.pop("tables"))
        mixed = f"A{recipe.allocation.budget:g} by {recipe.allocation.site}"
        perplexity[mixed] = score(quantized)["perplexity"]
    if not allow_broken:
        _check_perplexity(perplexity, original["perplexity"], vocab_size)
    sample = np.zeros(0, np.int32)
    if sample_tokens:
        with phases("generate"):
            prompt = check_tokens[:1, :_PROMPT_TOKENS]
            sample = hosts.from_first(lambda: _sample(quantized, prompt, sample_tokens, allow_broken))
    report = {
        **environment(),
        "model": hosts.from_first(lambda: describe_model(path)),
        "recipe": recipe.to_dict(),
        "calibration": {
            **text.describe(),
            **dataclasses.asdict(recipe.calibration),
            "tokens": int(drawn.calibration.size),
        },
        "tokenizer": _describe_tokenizer(tokenizer),
        "dtype": dtype,
        "evaluation": {
            **check.describe(),
            **{key: original[key] for key in ("windows", "seq_len", "tokens")},
            "perplexity": {"full": original["perplexity"], **perplexity},
            "sample": tokenizer.decode(sample),
            **by_domain,
        },
        **dict.fromkeys(("layers", "refine_blocks", "refine", "train_clips")),
        **figures,
        **allocated,
        "seconds": phases.seconds,
        "peak_memory": peak_memory(),
        "peak_memory_by_phase": phases.peak_memory,
    }
    with phases("save"):

        def save() -> dict[str, Any]:
            checkpoint.save(quantized, tokenizer, out, recipe, report, extra=extra, overwrite=overwrite)
            folders.discard_work(work_dir, out)
            return accounting.account(out)

        size = hosts.from_first(save)
    return {**report, "size": size}


def format_report(report: dict[str, Any], out: str | Path) -> str:
    """Return the figures of `quantize_to_folder` as lines of text for a person."""
    evaluation, memory = report["evaluation"], report["peak_memory"]
    windows = f"{evaluation['windows']} windows of {evaluation['seq_len']}"
    perplexity = "   ".join(f"{name} {value:.2f}" for name, value in evaluation["perplexity"].items())
    seconds = "   ".join(f"{phase} {spent:.0f} s" for phase, spent in report["seconds"].items())
    device = f"   device {memory['device_bytes'] / 1e9:.2f} GB" if memory["device_bytes"] else ""
    return "\n".join(
        [
            f"{report['model']['name']} → {out}",
            "",
            accounting.format_account(report["size"]),
            "",
            *([allocate_bits.format_result(report), ""] if "allocation" in report else []),
            *([format_domains(evaluation["by_domain"]), ""] if "by_domain" in evaluation else []),
            f"perplexity on {evaluation['name']} ({windows}):   {perplexity}",
            f"time:   {seconds}",
            f"peak memory:   host {memory['host_bytes'] / 1e9:.2f} GB{device}",
        ]
    )


def _known_figures(
    known: Mapping[str, Any] | None, check: corpora.Corpus, tokens: np.ndarray
) -> dict[str, Any] | None:
    """Return the figures of the original that another report has, if they are of the same text and windows."""
    here = {
        **check.describe(),
        "windows": len(tokens),
        "seq_len": tokens.shape[1],
        "tokens": int(tokens.size),
    }
    if known is None or any(known.get(key) != value for key, value in here.items()):
        return None
    return {**here, "perplexity": known["perplexity"]["full"]}


def _sample_text(
    model: Decoder, recipe: Recipe, work_dir: Path, phases: Phases, progress: bool
) -> sampled.SampledText:
    """Return the model's own text, as much of it as the recipe wants."""
    drawn = recipe.calibration
    if recipe.allocation.seq_len > drawn.seq_len:
        raise TwlaError(
            f"allocation.seq_len = {recipe.allocation.seq_len}: the model's own text comes in windows of"
            f" {drawn.seq_len}"
        )
    with phases("sample the model's own text"):
        rows = hosts.from_first(
            lambda: self_sampling.sample_text(
                model,
                recipe_windows.count(recipe),
                drawn.seq_len,
                seed=drawn.seed,
                work_dir=work_dir,
                progress=progress,
            )
        )
    return sampled.SampledText(rows=rows, seed=drawn.seed, held_out=recipe.allocation.windows)


def _check_perplexity(perplexity: Mapping[str, float], full: float, vocab_size: int) -> None:
    """Refuse a model that predicts worse than a uniform guess where the original, of perplexity `full`, did not."""
    limit = max(vocab_size, 2 * full)
    for bits, value in perplexity.items():
        if not value <= limit:  # also when it is NaN
            raise TwlaError(
                f"the quantised model is broken: perplexity {value:.1f} at {bits}, full precision {full:.1f}"
            )


def _sample(model: Decoder, prompt: np.ndarray, tokens: int, allow_broken: bool) -> np.ndarray:
    """Return a sample of the model's text, at temperature 1, where even a poor model varies.

    Layer errors can all look fine while the model is broken: it then samples one token over and over.
    """
    try:
        sample = generate(model, prompt, max_new_tokens=tokens, temperature=1.0, eos_token_ids=())[0]
    except TwlaError:  # its logits are not finite
        if not allow_broken:
            raise
        return np.zeros(0, np.int32)
    if not allow_broken and len(set(sample.tolist())) == 1:
        raise TwlaError(f"the quantised model is broken: it generates token {sample[0]} over and over")
    return sample


def _evaluation_name(corpus: str) -> str:
    if corpus == "wikitext2-train":
        return "wikitext2"
    return corpus if corpus in corpora.corpus_names() else "pydoc"


def _describe_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return what decides how text becomes tokens: the tokenizer by its hash, and whether it puts BOS in front."""
    first = tokenizer("a")["input_ids"][0]
    return {
        "sha256": hashlib.sha256(as_json(tokenizer).encode()).hexdigest(),
        "adds_bos": first == tokenizer.bos_token_id,
    }
