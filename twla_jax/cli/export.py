"""Defines the command that writes a quantised model for other tools: `export`."""

from typing import Annotated, Literal

import tyro

from twla_jax.cli.options import OptionalDtype, Out, argument, show

Format = Literal["hf", "gguf", "compressed-tensors", "hqq", "safetensors"]
GgufType = Literal["f16", "q2_0", "tq2_0"]
Dest = Annotated[tyro.conf.Positional[str], argument("DEST")]


def export(
    out: Out,
    dest: Dest,
    /,
    *,
    format: Format,
    dtype: OptionalDtype = None,
    type: Annotated[GgufType | None, argument("{f16,q2_0,tq2_0}", optional=True)] = None,
    json: bool = False,
) -> None:
    """Write a quantised model in another tool's format, or refuse what that format cannot hold.

    The tokenizer and its chat template go along, in a folder also the generation settings.

    Args:
        out: folder written by twla
        dest: folder to write, or file of --format gguf
        format: hf, a Hugging Face folder with dequantised weights, rotations folded in; gguf, one file for llama.cpp,
            with these weights in float16 or ternary; compressed-tensors, packed 2-bit integers for vLLM; hqq, packed
            2-bit integers with zero points for the hqq package; safetensors, the packed arrays in one file
            (examples/read_packed.py reads it with numpy alone)
        dtype: type of the weights in hf; default: bfloat16
        type: type of the linears in gguf; q2_0 and tq2_0 hold models of the recipe w1.58-sym exactly; default: f16
        json: print what was written as JSON
    """
    from twla_jax.jobs import export_model

    figures = export_model.export_model(out, dest, format=format, dtype=dtype, gguf_type=type)

    def text() -> str:
        lines = [f"{dest}: {format}, {len(figures['files'])} files, {figures['bytes']:,} bytes"]
        if figures["activation_bits"] < 16 and format != "safetensors":
            lines.append("activations are not quantised there; compare with twla eval --activation-bits 16")
        return "\n".join(lines)

    show(figures, json, text)
