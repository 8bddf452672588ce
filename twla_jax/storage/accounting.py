"""Counts bytes and bits of a saved model, from what is stored.

A label is not a size: every figure here follows from the arrays that the checkpoint lists, and their total is
set beside the bytes that lie on the disk.
"""

import collections
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from twla_jax.core import packing
from twla_jax.models.families import FAMILIES
from twla_jax.storage import checkpoint

CATEGORIES = (
    "codes",
    "scales_and_offsets",
    "bitmaps",
    "rotations",
    "clips",
    "embeddings",
    "unquantised",
    "tokenizer_and_metadata",
)
_CATEGORY = {"rotation": "rotations", "activation": "clips", "array": "unquantised"}
_CODES = ("codes", "residual_codes")
_BITMAPS = ("large", "salient")  # of the published layout
_LINEAR = ("codes", "scales_and_offsets", "bitmaps", "rotations", "clips")


def account(folder: str | Path) -> dict[str, Any]:
    """Return the size of a saved model, in bytes and in bits a weight; reads no array.

    Returns:
      A JSON-ready dict:
      `bits_per_weight_linear`: codes, scales and offsets, bitmaps, rotations and clips over the quantised weights;
      `bits_per_weight_model`: every stored tensor over all weights (a tied embedding is stored and counted once);
      `bits_per_weight_linear_in_memory`: as the first, with ternary codes at 2 bits and integers at a byte;
      `bytes_on_disk`: sum of the sizes of the folder's files, and `bytes_accounted`: sum of `breakdown`;
      `breakdown`: bytes for each of `CATEGORIES`; `per_layer`: the same for each block (a list);
      `num_experts` of a layer, 0 where there are none;
      `activated_weights`, `activated_bytes`: those that one token reads: of experts only its own, of the embedding one
      row, else all that is stored;
      `linears`: for each linear its shape and its bits per weight, codes and scales only;
      `plain_int4_g128`, `plain_int3_g128`: bits per weight of the linears and size of the file, were the linears
      asymmetric integers with one fp16 scale and one integer zero point for each row and 128 columns.

    Raises:
      TwlaError: `folder` holds no quantised model.
    """
    folder = Path(folder)
    manifest = checkpoint.read_manifest(folder)
    num_layers, share = manifest["config"]["num_layers"], _activated(manifest["config"])
    activated_weights = activated_bytes = Fraction(0)
    totals, layer, linears = collections.Counter(), collections.Counter(), {}
    weights = quantized_weights = memory_codes = 0
    plain_bits = dict.fromkeys((4, 3), 0)
    for name, entry in manifest["tensors"].items():
        before = weights
        sizes = {part: math.prod(a["shape"]) for part, a in entry["arrays"].items()}
        stored = {part: sizes[part] * jnp.dtype(a["dtype"]).itemsize for part, a in entry["arrays"].items()}
        if entry["kind"] == "integer" and not name.startswith("blocks."):
            weights += math.prod(entry["arrays"]["codes"]["shape"][:-1]) * entry["static"]["in_features"]
            split = {"embeddings": sum(stored.values())}
        elif entry["kind"] in ("ternary", "integer", "grouped"):
            rows, columns = math.prod(entry["arrays"]["codes"]["shape"][:-1]), entry["static"]["in_features"]
            quantized_weights += rows * columns
            weights += rows * columns
            planes = sum(part in _CODES for part in stored)
            if entry["kind"] == "grouped":
                widths = (columns, entry["static"]["salient_width"])
                memory_codes += rows * sum(map(packing.packed_width, widths))
            else:
                width = packing.packed_width(columns) if entry["kind"] == "ternary" else columns
                memory_codes += planes * rows * width
            codes = sum(size for part, size in stored.items() if part in _CODES)
            bitmaps = sum(size for part, size in stored.items() if part in _BITMAPS)
            split = {"codes": codes, "bitmaps": bitmaps}
            split["scales_and_offsets"] = sum(stored.values()) - codes - bitmaps
            linears[name.removesuffix(".kernel")] = {
                "shape": [*entry["arrays"]["codes"]["shape"][:-1], columns],
                "bits_per_weight": 8 * sum(split.values()) / (rows * columns),
            }
            for bits in plain_bits:
                plain_bits[bits] += rows * (columns * bits + math.ceil(columns / 128) * (16 + bits))
        else:
            split = {_CATEGORY[entry["kind"]]: sum(stored.values())}
            weights += sizes[""] if entry["kind"] == "array" else 0
        totals.update(split)
        of_token = share(name)
        activated_weights += (weights - before) * of_token
        activated_bytes += sum(split.values()) * of_token
        if name.startswith("blocks."):
            layer.update({category: size / num_layers for category, size in split.items()})

    on_disk = {
        str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }
    tensor_bytes = sum(totals.values())
    # Chunk files hold the arrays' bytes and nothing else; whatever else lies in the folder is counted by file.
    totals["tokenizer_and_metadata"] = sum(size for name, size in on_disk.items() if not _is_chunk(name))
    linear_bytes = sum(totals[category] for category in _LINEAR)
    plain = {
        f"plain_int{bits}_g128": {
            "bits_per_weight_linear": plain_bits[bits] / max(quantized_weights, 1),
            "bytes": math.ceil(plain_bits[bits] / 8)
            + totals["embeddings"]
            + totals["unquantised"]
            + totals["tokenizer_and_metadata"],
        }
        for bits in plain_bits
    }
    in_memory = linear_bytes - totals["codes"] + memory_codes
    return {
        "bits_per_weight_linear": 8 * linear_bytes / max(quantized_weights, 1),
        "bits_per_weight_model": 8 * tensor_bytes / weights,
        "bits_per_weight_linear_in_memory": 8 * in_memory / max(quantized_weights, 1),
        "bytes_on_disk": sum(on_disk.values()),
        "bytes_accounted": sum(totals.values()),
        "weights": weights,
        "quantized_weights": quantized_weights,
        "num_experts": manifest["config"].get("num_experts", 0),
        "activated_weights": round(activated_weights),
        "activated_bytes": round(activated_bytes),
        "breakdown": {category: totals[category] for category in CATEGORIES},
        "per_layer": [{category: round(layer[category]) for category in CATEGORIES[:-1]}] * num_layers,
        "linears": linears,
        **plain,
    }


def _activated(config: dict[str, Any]) -> Callable[[str], Fraction]:
    """Return what gives the share of a tensor that one token reads, from its name."""
    family = FAMILIES.get(config["model_type"])
    sites = [site for site in family.block.sites if site.experts] if family else []
    leaves = ("kernel", "bias")
    of_experts = {f"blocks.{name}.{leaf}" for site in sites for name in site.linears for leaf in leaves}

    def share(name: str) -> Fraction:
        if name in of_experts:
            return Fraction(config["experts_per_token"], config["num_experts"])
        row_alone = name == "embed" and not config["tie_word_embeddings"]
        return Fraction(1, config["vocab_size"]) if row_alone else Fraction(1)

    return share


def format_account(account: dict[str, Any]) -> str:
    """Return the figures of `account` as lines of text for a person."""
    on_disk, linear_weights = account["bytes_on_disk"], max(account["quantized_weights"], 1)
    lines = [
        f"bits per weight, linears   {account['bits_per_weight_linear']:8.3f}"
        f"   ({account['bits_per_weight_linear_in_memory']:.3f} in memory)",
        f"bits per weight, model     {account['bits_per_weight_model']:8.3f}",
        f"bytes on disk        {on_disk:14,}",
        *_of_token(account),
        "",
        f"{'':24}{'bytes':>14}{'share':>9}{'bits/weight':>13}{'a layer':>14}",
    ]
    for category, size in account["breakdown"].items():
        bits = f"{8 * size / linear_weights:.3f}" if category in _LINEAR else ""
        layer = f"{account['per_layer'][0].get(category, 0):,}" if account["per_layer"] else ""
        lines.append(f"  {category.replace('_', ' '):22}{size:14,}{size / on_disk:9.1%}{bits:>13}{layer:>14}")
    lines.append("")
    for bits in (4, 3):
        plain = account[f"plain_int{bits}_g128"]
        lines.append(
            f"plain INT{bits} g128 would take {plain['bytes']:,} bytes"
            f" ({plain['bits_per_weight_linear']:.3f} bits a weight in the linears)"
        )
    return "\n".join(lines)


def _of_token(account: dict[str, Any]) -> list[str]:
    """Return a line on what one token reads, where it reads some experts of many."""
    if not account["num_experts"]:
        return []
    return [
        f"a token activates    {account['activated_bytes']:14,} bytes, {account['activated_weights']:,} of"
        f" {account['weights']:,} weights"
    ]


def _is_chunk(name: str) -> bool:
    """Return whether a file of the folder is one array's data: `params/<array>/<chunk indices>`."""
    parts = name.split("/")
    return len(parts) == 3 and parts[0] == "params" and parts[2].replace(".", "").isdigit()
