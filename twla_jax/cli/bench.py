"""Defines the command `bench`, which measures speed on this device and prints each row when it is done."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from twla_jax import json_text
from twla_jax.cli.options import (
    OptionalFile,
    OptionalLayers,
    OptionalMesh,
    argument,
    mesh_of,
    number,
    numbers,
)

Shape = Literal["llama-2-7b", "llama-2-70b", "qwen3-8b", "smollm2-135m", "tiny"]


def bench(
    part: tyro.conf.Positional[Literal["all", "kernels", "prefill", "decode"]] = "all",
    /,
    *,
    shape: Shape = "llama-2-7b",
    batch: Annotated[str, argument("N,…")] = "1",
    tokens: Annotated[int, number("tokens")] = 2048,
    context: Annotated[int, number("context")] = 512,
    steps: Annotated[int, number("steps")] = 64,
    layers: OptionalLayers = None,
    activation_bits: Annotated[str, argument("BITS,…")] = "16,8,4",
    embedding_bits: Annotated[int, number("embedding_bits", "BITS")] = 16,
    kv_cache: Literal["bfloat16", "int8"] = "bfloat16",
    mesh: OptionalMesh = None,
    plot: OptionalFile = None,
    json: bool = False,
) -> None:
    """Time kernels, prefill and decoding beside XLA's own operations, on random weights of a model's shape.

    It needs no model. Rows are printed as they are measured. Without kernels for the device, it times the XLA
    reference and says so.

    Args:
        part: kernels (one op at a few tokens), prefill (one op at many tokens), decode (whole model), or all
        shape: the model whose matrix sizes are used
        batch: sequences decoded together, and tokens of a single op; several values with commas
        tokens: tokens in a prefill
        context: tokens already in the cache when decoding begins
        steps: tokens to decode
        layers: blocks in the decoding model; default: all
        activation_bits: activation bits to decode with; with 16, single ops are also timed on bfloat16 activations
        embedding_bits: bits of the embedding and the LM head, 2 to 8, or 16; below 16, the head is also timed alone
        kv_cache: type of the key/value cache
        mesh: devices to split the decoding models over, as model=2; kernels and prefill run on one
        plot: write a roofline plot to this image file
        json: print all figures as JSON at the end
    """
    from twla_jax import bench
    from twla_jax.bench import table
    from twla_jax.reports import plotting

    if plot:
        plotting.require_place(plot)
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
        batches=numbers(batch, int, "--batch", "batch"),
        tokens=tokens,
        context=context,
        steps=steps,
        layers=layers,
        cache_dtype=kv_cache,
        activation_bits=numbers(activation_bits, int, "--activation-bits", "activation_bits"),
        embedding_bits=embedding_bits,
        mesh=mesh_of(mesh),
        on_row=show,
    )
    if plot:
        plotting.plot_roofline(plot, result)
    print(json_text.dumps(result).rstrip() if json else table.footer(result))
