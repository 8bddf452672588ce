"""Times PyTorch's and gemlite's products for `beside.py`, which gives the sizes on stdin and reads lines of JSON.

With `--warm` every gemlite product runs once and nothing is timed: what Triton compiles is then in its cache.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from typing import Any

ROTATED_BYTES = 250e6  # as `twla_jax.bench.timing`: several times the largest L2 cache
GROUP = 128
Calls = list[Callable[[], Any]]


def bf16_calls(torch: Any, n: int, m: int, tokens: int, copies: int) -> tuple[Calls, Any, Any]:
    """Return calls of `x wᵀ` in bf16 on matrices of their own, and the first one's input and weight."""
    made = [
        (_normal(torch, tokens, m, torch.bfloat16), _normal(torch, n, m, torch.bfloat16))
        for _ in range(copies)
    ]
    product = torch.nn.functional.linear
    return [lambda x=x, w=w: product(x, w) for x, w in made], *made[0]


def a16w2_calls(torch: Any, n: int, m: int, tokens: int, copies: int) -> tuple[Calls, Any, Any]:
    """Return calls of gemlite's weight-only product: 2 bits, float16, a scale and a zero point for every group."""
    from gemlite.helper import A16W2_HQQ_INT

    def layer():
        codes = torch.randint(0, 3, (n, m), device="cuda", dtype=torch.uint8)
        scales = (torch.rand(n, m // GROUP, device="cuda") + 0.5).half() * m**-0.5
        return (
            A16W2_HQQ_INT(device="cuda:0").from_weights(codes, scales, torch.ones_like(scales)),
            codes,
            scales,
        )

    made = []
    for i in range(copies):
        linear, codes, scales = layer()
        if not i:
            weight = (codes.float() - 1) * scales.float().repeat_interleave(GROUP, 1)
        made.append((linear, _normal(torch, tokens, m, torch.float16)))
    return [lambda linear=linear, x=x: linear(x) for linear, x in made], made[0][1], weight


def a8w158_calls(torch: Any, n: int, m: int, tokens: int, copies: int) -> tuple[Calls, Any, Any]:
    """Return calls of gemlite's ternary product: one scale a matrix, tokens turned into int8 codes by the call."""
    from gemlite.helper import A8W158_INT_dynamic

    made = []
    for i in range(copies):
        ternary = torch.randint(-1, 2, (n, m), device="cuda", dtype=torch.int8).half()
        scale = torch.tensor(m**-0.5)
        linear = A8W158_INT_dynamic(device="cuda:0").from_weights(ternary, scale)
        if not i:
            weight = ternary.float() * scale.item()
        made.append((linear, _normal(torch, tokens, m, torch.float16)))
    return [lambda linear=linear, x=x: linear(x) for linear, x in made], made[0][1], weight


KINDS = {"torch": (bf16_calls, 16), "a16w2": (a16w2_calls, 2.25), "a8w158": (a8w158_calls, 2)}


def _normal(torch: Any, rows: int, columns: int, dtype: Any) -> Any:
    return torch.randn(rows, columns, device="cuda", dtype=dtype)


def kernel_microseconds(torch: Any, calls: Calls, rounds: int = 3) -> float:
    """Return the time of all kernels, copies and fills that a call launches, by CUPTI; nan if none were seen."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
    on_device = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    total = sum(event.time_range.elapsed_us() for event in on_device)
    return total / (rounds * len(calls)) if total else float("nan")


def graph_microseconds(calls: Calls) -> float:
    """Return the time of a call within a CUDA graph of all calls, the gaps between kernels included."""
    from triton.testing import do_bench_cudagraph

    def run():
        for call in calls:
            call()

    return do_bench_cudagraph(run, rep=20) * 1e3 / len(calls)


def time_case(torch: Any, kind: str, case: list[int]) -> dict[str, Any]:
    """Return a row: the time, and a text that says it with the error against the product in float32."""
    n, m, tokens = case
    make, bits = KINDS[kind]
    copies = int(ROTATED_BYTES / (n * m * bits / 8)) + 1
    calls, x, weight = make(torch, n, m, tokens, copies)
    expected = x.float() @ weight.float().T
    error = ((calls[0]().float() - expected).norm() / expected.norm()).item()
    for call in calls:
        call()
    torch.cuda.synchronize()
    notes = [f"error {error:.1e}"]
    times = {}
    for name, measure in (
        ("kernels", lambda: kernel_microseconds(torch, calls)),
        ("graph", lambda: graph_microseconds(calls)),
    ):
        try:
            times[name] = measure()
            notes.append(f"{name} {times[name]:.1f} us")
        except Exception as fault:  # the other one will do
            notes.append(f"{name}: {_first_line(fault)}")
    known = [value for value in (times.get("kernels"), times.get("graph")) if value == value and value]
    row: dict[str, Any] = {
        "case": case,
        "kind": kind,
        "text": f"{n}x{m}, {tokens} tokens, {kind}: {', '.join(notes)}",
    }
    if error > 0.05:
        row["text"] += " (wrong: left out)"
    elif known:
        row["microseconds"] = known[0]
    return row


def _first_line(fault: Exception) -> str:
    return (str(fault).splitlines() or [type(fault).__name__])[0][:120]


def _say(text: str) -> None:
    print(json.dumps({"text": text}), flush=True)


def main() -> None:
    """Read the sizes, print a line for each product."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    cases = json.load(sys.stdin)
    missing = [name for name in ("torch", "triton", "gemlite") if importlib.util.find_spec(name) is None]
    if missing:
        _say(f"not installed: {', '.join(missing)}")
    if "torch" in missing:
        return
    import torch

    if not torch.cuda.is_available():
        _say(f"PyTorch {torch.__version__} sees no NVIDIA device")
        return
    kinds = ["torch"] if missing else list(KINDS)
    if not missing:
        try:
            import gemlite

            _say(f"PyTorch {torch.__version__}, gemlite {gemlite.__version__}")
        except Exception as fault:
            _say(f"gemlite cannot be imported: {_first_line(fault)}")
            kinds = ["torch"]
    for case in cases:
        for kind in kinds:
            try:
                if options.warm:
                    if kind != "torch":
                        KINDS[kind][0](torch, *case, 1)[0][0]()
                elif time.monotonic() > deadline:
                    _say("time is up: the rest is not timed")
                    return
                else:
                    print(json.dumps(time_case(torch, kind, case)), flush=True)
            except Exception as fault:  # one that does not compile must not end the run
                _say(f"{case}, {kind}: {_first_line(fault)}")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
