"""Formats rows of measurements as lines of a Markdown table, one at a time."""

from collections.abc import Callable, Mapping
from typing import Any

_Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def _number(key: str, form: str, scale: float = 1) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: format(row[key] * scale, form) if key in row else ""


def _first(row: Mapping[str, Any]) -> str:
    return row["name"]


_COLUMNS: dict[str, list[_Column]] = {
    "kernels": [
        ("op", _first),
        ("matrix", lambda row: f"{row['rows']}×{row['columns']}"),
        ("tokens", _number("tokens", "d")),
        ("MB", _number("bytes", ".2f", 1e-6)),
        ("µs", _number("microseconds", ".1f")),
        ("GB/s", _number("bytes_per_second", ".0f", 1e-9)),
        ("of copy", _number("copy_fraction", ".0%")),
        ("of a copy as small", _number("small_copy_fraction", ".0%")),
        ("XLA bf16 µs", _number("bf16_microseconds", ".1f")),
        ("× bf16", _number("speedup_bf16", ".2f")),
        ("XLA int8 µs", _number("int8_microseconds", ".1f")),
        ("× int8", _number("speedup_int8", ".2f")),
        ("× XLA reference", _number("speedup_xla", ".2f")),
    ],
    "prefill": [
        ("matrix", _first),
        ("rows × columns", lambda row: f"{row['rows']}×{row['columns']}" if row["rows"] else ""),
        ("tokens", _number("tokens", "d")),
        ("product µs", _number("microseconds", ".0f")),
        ("TOPS", _number("tera_operations_per_second", ".0f")),
        ("+ rotation µs", _number("with_rotation_microseconds", ".0f")),
        ("XLA bf16 µs", _number("bf16_microseconds", ".0f")),
        ("all ÷ bf16", _number("speedup_bf16", ".2f")),
        ("XLA int8 µs", _number("int8_microseconds", ".0f")),
        ("product ÷ int8", _number("product_over_int8", ".2f")),
    ],
    "decode": [
        ("model", _first),
        ("batch", _number("batch", "d")),
        ("layers", _number("layers", "d")),
        ("context", _number("context", "d")),
        ("weights GB", _number("weight_bytes", ".2f", 1e-9)),
        ("cache GB", _number("cache_bytes", ".2f", 1e-9)),
        ("µs a step", _number("microseconds", ".0f")),
        ("tokens/s", _number("tokens_per_second", ".0f")),
        ("of bandwidth limit", _number("bandwidth_limit_fraction", ".0%")),
        ("× bf16", _number("speedup_bf16", ".2f")),
        ("bits a weight on the device", _number("device_bits_per_weight", ".2f")),
    ],
}
TITLES = {
    "kernels": "Kernels, few tokens",
    "prefill": "Prefill: speedups over XLA (above 1 is faster)",
    "decode": "Whole-model decode",
}


def header(part: str) -> str:
    """Return the head of a part's table."""
    names = [name for name, _ in _COLUMNS[part]]
    return "\n".join([f"\n## {TITLES[part]}\n", _line(names), _line(["---"] * len(names))])


def line(part: str, row: Mapping[str, Any]) -> str:
    """Return one row; a note in place of figures where there are none."""
    if "note" in row:
        return _line([row["name"], row["note"], *[""] * (len(_COLUMNS[part]) - 2)])
    return _line([cell(row) for _, cell in _COLUMNS[part]])


def footer(result: Mapping[str, Any]) -> str:
    """Return the lines that say what the figures were made on."""
    peaks = result["product_operations_per_second"]
    copy = f"copy {result['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    if by_clock := result.get("copy_bytes_per_second_by_clock"):
        copy += f", by the clock {by_clock / 1e9:.0f}"
    lines = [
        "",
        f"{result['shape']}; {copy}; XLA's largest products "
        f"{peaks['bfloat16'] / 1e12:.0f} TFLOP/s in bf16, {peaks['int8'] / 1e12:.0f} TOPS in int8",
        f"{result['path']}; timed by {result['timer']['kernels']} (decode: wall clock)",
        *(f"fallback: {message}" for message in result["fallbacks"]),
    ]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
