"""Defines the command that measures a model, quantised or not: `eval`."""

import math
from typing import TYPE_CHECKING, Annotated, Any

from twla_jax.cli.options import (
    BatchSize,
    Kernels,
    Model,
    OptionalBits,
    OptionalDtype,
    OptionalHosts,
    OptionalLimit,
    OptionalMaxWindows,
    OptionalMesh,
    SeqLen,
    argument,
    join_hosts,
    mesh_of,
    show,
)
from twla_jax.cli.use import load_for_use
from twla_jax.errors import TwlaError

if TYPE_CHECKING:  # which imports JAX
    from jax.sharding import Mesh


def evaluate(
    model: Model,
    /,
    *,
    corpus: Annotated[str, argument("CORPUS|FILE")] = "pydoc",
    domains: Annotated[str | None, argument("DIR|NAMES")] = None,
    tasks: Annotated[str | None, argument("NAMES", optional=True)] = None,
    limit: OptionalLimit = None,
    against: Annotated[str | None, argument("MODEL")] = None,
    seq_len: SeqLen = 2048,
    max_windows: OptionalMaxWindows = None,
    activation_bits: OptionalBits = None,
    batch_size: BatchSize = 1,
    kernels: Kernels = "off",
    mesh: OptionalMesh = None,
    coordinator: OptionalHosts = None,
    dtype: OptionalDtype = None,
    json: bool = False,
) -> None:
    """Measure the perplexity of a model, quantised or not, on the evaluation text of a corpus or of several.

    With --domains it prints a table with a row for each text, the worst last. With --against it also says how far the
    predictions are from the original's: KL divergence, share of equal top-1 tokens, ratio of the perplexities.

    With --tasks it runs tasks of lm-evaluation-harness instead; with --against it also prints the points lost.

    By default it computes as the quantiser does, without packed kernels, on any device. The README's perplexities were
    measured in this way.

    Args:
        model: folder written by twla, Hugging Face folder, .gguf file, hub id (org/name), or smollm2
        corpus: text to score: mix, pydoc, wikitext2, c4, a .txt or .jsonl file, or a folder of these
        domains: texts to score one by one: mix (several domains), a folder of .txt and .jsonl files, or corpora with
            commas between them
        tasks: tasks to answer, with commas between them: hellaswag, arc_easy, piqa, boolq, any other of
            lm-evaluation-harness, or a .yaml file; needs the extra eval
        limit: answer only the first N documents of each task
        against: original to compare with, named as MODEL is
        seq_len: tokens per window; windows do not overlap
        max_windows: score only the first N windows of each text
        activation_bits: bits of the linear inputs, 16 leaves them unquantised; default: as saved
        batch_size: windows scored at a time; for tasks, as many tokens as these windows have
        kernels: on packs the weights and runs the device's kernels; off computes as the quantiser does; auto packs
            only where there are kernels, and on a CPU unpacks the weights once, if they fit
        mesh: devices to split the work over: windows over data, matrices over model
        coordinator: use the devices of several hosts, each of which runs this command with --mesh: auto on Cloud TPU
            and SLURM, else the address of process 0, the number of processes, and the index of this one
        dtype: type the model computes in; default: float32, or bfloat16 with kernels
        json: print the figures as JSON
    """
    from twla_jax import hosts
    from twla_jax.evaluation import scoring
    from twla_jax.models import config
    from twla_jax.text import corpora

    join_hosts(coordinator, mesh, beside={"--tasks": tasks, "--domains": domains, "--against": against})
    if tasks is not None:
        form = {"dtype": dtype, "activation_bits": activation_bits, "kernels": kernels, "mesh": mesh_of(mesh)}
        _evaluate_tasks(model, tasks, against, limit, batch_size * seq_len, form, json)
        return
    if domains is not None or against is not None:
        _evaluate_domains(
            model,
            corpus if domains is None else domains,
            against,
            options={"seq_len": seq_len, "max_windows": max_windows, "batch_size": batch_size},
            form={"dtype": dtype, "activation_bits": activation_bits, "kernels": kernels},
            mesh=mesh_of(mesh),
            json=json,
        )
        return
    text = corpora.load_corpus(corpus, "evaluation")
    devices = mesh_of(mesh)
    decoder, tokenizer, path = load_for_use(model, dtype, activation_bits, kernels, devices)
    tokens = corpora.tokenize(text, tokenizer, decoder.config.vocab_size)
    config.check_length(seq_len, decoder.config)
    result = scoring.evaluate(
        decoder,
        tokens,
        seq_len=seq_len,
        max_windows=max_windows,
        batch_size=batch_size,
        mesh=devices,
        progress=hosts.is_first(),
    )
    if not hosts.is_first():
        return
    _require_number(model, result["perplexity"])
    result = {**result, "corpus": text.describe(), "dtype": str(decoder.dtype), "path": path}
    result["activation_bits"] = activation_bits
    show(
        result,
        json,
        lambda: (
            f"perplexity {result['perplexity']:.3f}  ({result['tokens']} tokens, {result['windows']} windows; "
            f"{path}, {result['dtype']})"
        ),
    )


def _evaluate_domains(
    model: str,
    names: str,
    against: str | None,
    *,
    options: dict[str, Any],
    form: dict[str, Any],
    mesh: "Mesh | None",
    json: bool,
) -> None:
    from twla_jax.evaluation import domains
    from twla_jax.jobs import loading
    from twla_jax.models import config
    from twla_jax.text import corpora

    corpora_by_name = corpora.load_domains(names)
    decoder, tokenizer, path = load_for_use(model, **form, mesh=mesh)
    original = None
    if against is not None:
        original, _ = loading.load(against, dtype=decoder.dtype)
    config.check_length(options["seq_len"], decoder.config)
    size = decoder.config.vocab_size
    tokens = {name: corpora.tokenize(text, tokenizer, size) for name, text in corpora_by_name.items()}
    result = domains.evaluate_domains(decoder, tokens, original=original, mesh=mesh, **options)
    for row in result["domains"]:
        _require_number(model, row["perplexity"], row["name"])
        _require_number(str(against), row.get("original_perplexity", 1.0), row["name"])
    texts = {name: text.describe() for name, text in corpora_by_name.items()}
    figures = {**result, "texts": texts, "against": against, "dtype": str(decoder.dtype), "path": path}
    figures["activation_bits"] = form["activation_bits"]
    show(figures, json, lambda: domains.format_domains(result))


def _require_number(model: str, perplexity: float, text: str | None = None) -> None:
    """Refuse a perplexity that is none, as of a model whose numbers overflow the type that it computes in."""
    if math.isnan(perplexity):
        where = "" if text is None else f" on text '{text}'"
        raise TwlaError(f"{model}: its predictions{where} are not numbers (NaN), so there is no perplexity")


def _evaluate_tasks(
    model: str,
    names: str,
    against: str | None,
    limit: int | None,
    batch_tokens: int,
    form: dict[str, Any],
    json: bool,
) -> None:
    from twla_jax.evaluation import harness, tasks

    decoder, tokenizer, path = load_for_use(model, **form)
    answering = [harness.HarnessModel(decoder, tokenizer, batch_tokens=batch_tokens)]
    if against is not None:
        full, spelling, _ = load_for_use(against, **(form | {"activation_bits": None, "kernels": "off"}))
        answering.append(harness.HarnessModel(full, spelling, batch_tokens=batch_tokens))
    wanted = [name.strip() for name in names.split(",")]
    result = tasks.evaluate_tasks(answering[0], wanted, original=(*answering, None)[1], limit=limit)
    figures = {**result, "against": against, "dtype": str(decoder.dtype), "path": path}
    figures |= {"activation_bits": form["activation_bits"], "limit": limit}
    show(figures, json, lambda: tasks.format_tasks(result))
