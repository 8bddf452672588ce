"""`twla bench`: speed on the device at hand, printed as it is measured."""

import json as json_format
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from twla_jax.cli.options import OptionalInt, argument, numbers

Shape = Literal["llama-2-7b", "llama-2-70b", "qwen3-8b", "smollm2-135m", "tiny"]


def bench(
    part: tyro.conf.Positional[Literal["all", "kernels", "prefill", "decode"]] = "all",
    /,
    *,
    shape: Shape = "llama-2-7b",
    batch: Annotated[str, argument("N,…")] = "1",
    tokens: Annotated[int, argument("N")] = 2048,
    context: Annotated[int, argument("N")] = 512,
    steps: Annotated[int, argument("N")] = 64,
    layers: OptionalInt = None,
    activation_bits: Annotated[str, argument("BITS,…")] = "16,8,4",
    embedding_bits: Annotated[int, argument("BITS")] = 16,
    kv_cache: Literal["bfloat16", "int8"] = "bfloat16",
    plot: Annotated[str | None, argument("FILE")] = None,
    json: bool = False,
) -> None:
    """Time kernels, prefill and whole-model decode beside XLA's own, with random weights of a model's shape.

    Args:
        part: kernels (few tokens), prefill (many), decode (whole models), or all
        shape: whose matrices to take
        batch: rows that decode together; several with commas
        tokens: tokens of a prefill
        context: tokens in the cache when decoding begins
        steps: tokens to decode
        layers: blocks of the decoding model; all if not given
        activation_bits: of the decoding models; 16 also times kernels with bfloat16 activations
        embedding_bits: of the ternary models' embedding and LM head, 2 to 8, or 16; below, kernels time it alone
        kv_cache: what the decoding models keep keys and values in
        plot: image to draw a roofline of the kernels and products in
        json: print the figures as JSON, at the end
    """
    from twla_jax import bench
    from twla_jax.bench import table
    from twla_jax.reports import plotting

    if plot:
        plotting.require_matplotlib()
    begun: set[str] = set()

    def show(name: str, row: Mapping[str, Any]) -> None:
        if json:
            return
        if name not in begun:
            print(table.header(name), flush=True)
            begun.add(name)
        print(table.line(name, row), flush=True)

    result = bench.measure(
        bench.PARTS if part == "all" else [part],
        shape,
        batches=numbers(batch, int, "--batch"),
        tokens=tokens,
        context=context,
        steps=steps,
        layers=layers,
        cache_dtype=kv_cache,
        activation_bits=numbers(activation_bits, int, "--activation-bits"),
        embedding_bits=embedding_bits,
        on_row=show,
    )
    if plot:
        plotting.plot_roofline(plot, result)
    print(json_format.dumps(result, indent=1) if json else table.footer(result))
