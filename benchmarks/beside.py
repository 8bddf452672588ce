"""Times the matrices of a model through gemlite, PyTorch, XLA and this library, on one NVIDIA card in one run.

    python benchmarks/beside.py
    python benchmarks/beside.py --shape llama-2-7b --tokens 1,16 --json beside.json

gemlite and PyTorch run first, in a process of their own (`beside_torch.py`), so that one framework's profiler and
memory are not in the other's way. Every figure is the time of all kernels that a call launches, by CUPTI, over so many
matrices that none is in the L2 cache. gemlite tunes itself before it is timed; a first pass of several processes fills
Triton's cache of compiled kernels, or tuning would take a quarter of an hour. What PyTorch or gemlite is missing is
said in one line, and the rest is timed. The table comes last: microseconds, then ratios, where above 1 this library is
faster.

gemlite's columns take float16 and have nothing to rotate: A16W2 with a scale and a zero point for every 128 weights,
and A8W1.58 with one scale a matrix and int8 codes of each token made on the way. Ours begin with bf16, rotate, and have
(α, μ) for every 128 weights: A16 by codes of 16 bits, A8 (and A4, which runs the same kernel) by codes of 8 bits.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from twla_jax import xla_flags

OTHERS = pathlib.Path(__file__).with_name("beside_torch.py")
COLUMNS = {
    "torch bf16": "torch",
    "XLA bf16": "xla",
    "gemlite A16W2": "a16w2",
    "gemlite A8W1.58": "a8w158",
    "ours A16": "a16",
    "ours A8, A4": "a8",
    "ours, codes given": "codes",
}
# (heading, slower if above 1, what it is divided by)
RATIOS = (
    ("A16W2 ÷ A16", ("a16w2",), "a16"),
    ("A8W1.58 ÷ A8", ("a8w158",), "a8"),
    ("bf16 ÷ A16", ("torch", "xla"), "a16"),
    ("bf16 ÷ A8", ("torch", "xla"), "a8"),
)
Case = tuple[int, int, int]  # rows, columns, tokens
Found = dict[tuple[Case, str], float]


def others(
    python: str, cases: list[Case], seconds: float, warm_seconds: float, found: Found
) -> Iterator[str]:
    """Put the times of PyTorch and gemlite into `found`, and yield what should be said of them."""
    command = [python, str(OTHERS)]
    sizes = sorted({(n, m) for n, m, _ in cases}, reverse=True)
    begun = [
        subprocess.Popen(
            [*command, "--warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in sizes
    ]
    start = time.monotonic()
    for process, size in zip(begun, sizes, strict=True):
        _send(process, [case for case in cases if case[:2] == size])
    for process in begun:
        try:
            process.wait(max(0.0, start + warm_seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    yield f"Triton's cache filled in {time.monotonic() - start:.0f} s"
    with tempfile.TemporaryFile("w+") as faults:
        process = subprocess.Popen(
            [*command, "--seconds", str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=faults,
            text=True,
        )
        assert process.stdout is not None
        _send(process, cases)
        # It stops by itself, unless one product takes that long.
        clock = threading.Timer(seconds + 60, process.kill)
        clock.start()
        for line in process.stdout:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # of a library that speaks on its own
            if "microseconds" in row:
                found[tuple(row["case"]), row["kind"]] = row["microseconds"]
            yield row["text"]
        clock.cancel()
        if process.wait():
            faults.seek(0)
            yield f"{OTHERS.name} ended with {process.returncode}: {(faults.read().splitlines() or [''])[-1]}"


def _send(process: subprocess.Popen[str], cases: list[Case]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it may be gone already, for want of a library
        process.stdin.write(json.dumps(cases))
        process.stdin.close()


def ours(cases: list[Case], deadline: float, found: Found) -> Iterator[str]:
    """Put the times of XLA and of this library into `found`, and yield a line for each."""
    import jax
    import jax.numpy as jnp

    from twla_jax.bench import shapes, timing
    from twla_jax.inference import execution
    from twla_jax.ops.quantized_linear import quantized_linear
    from twla_jax.ops.rotate_quantize import quantizer_settings
    from twla_jax.ops.ternary_matmul import ternary_matmul

    yield f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {execution.path()}, by {timing.timer()}"
    timing.copy_bandwidth()  # what is timed first takes longer

    def operands(key, size: Case, codes: bool):
        n, m, tokens = size
        x = shapes.tokens(key, tokens, m) if codes else jax.random.normal(key, (tokens, m), jnp.bfloat16)
        return shapes.weight(key, n, m), x

    def dense(key, size: Case):
        n, m, tokens = size
        return [jax.random.normal(key, shape, jnp.bfloat16) for shape in ((n, m), (tokens, m))]

    def linear(weight, x, *, rotation, settings):
        return quantized_linear(x, rotation, settings, weight)

    def kinds(n: int, m: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], int]]:
        rotation = shapes.rotation_for_kernels(jax.random.key(2), m, n)
        tokens = functools.partial(operands, codes=False)
        a8 = functools.partial(linear, rotation=rotation, settings=quantizer_settings(8, 0.9))
        a16 = functools.partial(linear, rotation=rotation, settings=None)
        product = functools.partial(operands, codes=True)
        return {
            "xla": (timing.dense_product, dense, 16),
            "codes": (lambda weight, x: ternary_matmul(x, weight), product, 2),
            "a8": (a8, tokens, 2),
            "a16": (a16, tokens, 2),
        }

    for case in cases:
        n, m, tokens = case
        for kind, (function, make, bits) in kinds(n, m).items():
            if time.monotonic() > deadline:
                yield "time is up: the rest is not timed"
                return
            try:
                taken = timing.seconds_each(function, functools.partial(make, size=case), n * m * bits // 8)
            except Exception as error:  # one that does not compile must not end the run
                yield f"{n}x{m}, {tokens} tokens, {kind}: {str(error).splitlines()[0][:120]}"
                continue
            found[case, kind] = taken * 1e6
            yield f"{n}x{m}, {tokens} tokens, {kind}: {taken * 1e6:.1f} us"


def table(names: dict[tuple[int, int], str], cases: list[Case], found: Found) -> Iterator[str]:
    """Yield the lines of the table: a row for every matrix and number of tokens."""
    heads = ["matrix", "tokens", *(f"{name}, µs" for name in COLUMNS), *(name for name, *_ in RATIOS)]
    yield _line(heads)
    yield _line(["---"] * len(heads))
    for case in cases:
        n, m, tokens = case
        times = {key: found[case, key] for key in COLUMNS.values() if (case, key) in found}
        cells = [f"{names[n, m]} {n}×{m}", str(tokens)]
        cells += [f"{times[key]:.1f}" if key in times else "" for key in COLUMNS.values()]
        for _, above, below in RATIOS:
            known = [times[key] for key in above if key in times]
            cells.append(f"{min(known) / times[below]:.2f}" if known and below in times else "")
        yield _line(cells)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Read the command line, time both sides, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-2-7b,qwen3-8b", help="models, with commas between them")
    parser.add_argument("--tokens", default="1,8,16,64", help="numbers of tokens, likewise")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="of the whole run; what is left then is not timed"
    )
    parser.add_argument(
        "--torch-python", default=sys.executable, help="the interpreter that has torch and gemlite"
    )
    parser.add_argument("--json", metavar="FILE", help="write all times there, in microseconds")
    options = parser.parse_args()
    start, seconds = time.monotonic(), options.minutes * 60
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    xla_flags.disable_triton_gemm()
    from twla_jax.bench import shapes

    names: dict[tuple[int, int], str] = {}
    for shape in options.shape.split(","):
        if shape not in shapes.SHAPES:
            parser.error(f"--shape {shape}: must be of {', '.join(shapes.SHAPES)}")
        for name, size in shapes.matrices(shapes.SHAPES[shape]).items():
            names.setdefault(size, f"{shape} {name}")
    try:
        numbers = [int(text) for text in options.tokens.split(",")]
    except ValueError:
        parser.error(f"--tokens {options.tokens}: must be numbers with commas between them")
    cases = [(n, m, tokens) for tokens in numbers for n, m in names]
    found: Found = {}
    for line in others(options.torch_python, cases, 0.4 * seconds, 0.25 * seconds, found):
        print(line, flush=True)
    for line in ours(cases, start + seconds, found):
        print(line, flush=True)
    if options.json:
        rows = [{"case": case, "kind": kind, "microseconds": taken} for (case, kind), taken in found.items()]
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    print()
    for line in table(names, cases, found):
        print(line, flush=True)


if __name__ == "__main__":
    main()
