"""Times prompts and decoding of thousands of tokens on a GPU, packed beside bf16.

Random weights of a model's shape. Attention alone is a chunk of a prompt to so many tokens before it: by cuDNN as a
prompt takes it, and by XLA, with the largest difference between the two; the prompt whole is as `generate` fills a
cache with it, and a decode step behind it. A4 is timed, and A8 runs the same kernels. By wall clock; tables come last.

    python benchmarks/long_context.py --tokens 8192,32768 --kv-cache int8
    python benchmarks/long_context.py --layers 4          # a quick look
    python benchmarks/long_context.py --steps             # decoding alone
"""

import argparse
import dataclasses
import functools
import gc
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax import xla_flags
from twla_jax.bench import decode, shapes, timing
from twla_jax.inference import generation
from twla_jax.inference.request import checked_request
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace
from twla_jax.ops.attention.fused import chunk_attention
from twla_jax.ops.attention.kv_cache import empty_layer, write
from twla_jax.ops.attention.reference import Positions, attention

STEPS = 32  # tokens decoded in a call


def attention_rows(config: DecoderConfig, room: int, dtype: Any) -> list[list[str]]:
    """Return a row for every length of chunk and number of tokens before it."""
    rows = []
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
    k, v = jax.random.normal(jax.random.key(0), (2, 1, room, kv_heads, d), jnp.bfloat16)
    layer = write(empty_layer((2, 1, kv_heads, room, d), dtype), k, v, jnp.int32(0))
    for tokens in (each for each in (512, 2048) if each <= room):
        for start in sorted({0, room // 4, room - tokens}):
            q = jax.random.normal(jax.random.key(1), (1, tokens, heads, d), jnp.bfloat16)
            angles = jnp.zeros((tokens, d // 2))
            at = start + jnp.arange(tokens, dtype=jnp.int32)
            positions = Positions(query=at, key=jnp.arange(room, dtype=jnp.int32), cos=angles, sin=angles)
            row = [str(tokens), str(start)]
            found, times = [], []
            for name, function in (
                ("cuDNN", chunk_attention),
                ("XLA", functools.partial(attention, window=jnp.int32(2**31 - 1))),
            ):
                try:
                    compiled = jax.jit(function)
                    found.append(compiled(q, layer, positions).astype(jnp.float32))
                    times.append(timing.wall_seconds(compiled, q, layer, positions, calls=10))
                except Exception as error:  # a kernel that this GPU has not must not end the run
                    print(f"attention by {name}: {_first_line(error)}", flush=True)
                    times.append(float("nan"))
            row += [f"{each * 1e6:.0f}" for each in times] + [f"{times[1] / times[0]:.1f}"]
            difference = (
                jnp.abs(found[0] - found[1]).max() / jnp.abs(found[1]).max() if len(found) == 2 else np.nan
            )
            rows.append([*row, f"{float(difference):.1e}"])
            print("attention:", *rows[-1], flush=True)
    return rows


def prefill_seconds(model: Decoder, tokens: int, dtype: Any, calls: int) -> float:
    """Return the least seconds of filling a new cache with a prompt of so many tokens, compiled before."""
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, tokens), np.int32)
    request = checked_request(model, prompt, STEPS, eos_token_ids=())
    size, times = generation.cache_size(generation.room_for(tokens, 0, STEPS)), []
    for _ in range(1 + calls):
        cache = jax.block_until_ready(model.init_cache(1, size, dtype))
        start = time.perf_counter()
        token, _, cache = generation.fill(request, cache, held=0)
        jax.block_until_ready((token, cache))
        times.append(time.perf_counter() - start)
        del cache
    print(f"  {tokens} tokens: {[round(each, 3) for each in times]} s, the first compiles", flush=True)
    return min(times[1:])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def model_rows(config: DecoderConfig, lengths: list[int], dtype: Any, *, prompts: bool) -> list[list[str]]:
    """Return a row for every model, way of attention and length of the prompt; of steps alone if not `prompts`."""
    rows, bf16 = [], {}
    for name, bits in (("bf16", None), ("W1.58A4", 4)):
        model = shapes.random_decoder(config, activation_bits=bits, embedding_bits=16 if bits is None else 4)
        jax.block_until_ready(model)
        for fused in (True, False) if prompts else (True,):
            for tokens in lengths if fused else lengths[:1]:
                print(f"{name}, attention by {'cuDNN' if fused else 'XLA'}", flush=True)
                try:
                    way = replace(model, fused=fused and model.fused)
                    taken = prefill_seconds(way, tokens, dtype, 3 if fused else 1) if prompts else np.nan
                    settings = decode.DecodeSettings(context=tokens, steps=STEPS, cache_dtype=dtype)
                    step = decode.step_seconds(model, 1, settings) if fused else float("nan")
                except Exception as error:  # too little memory for one length must not end the run
                    print(f"  {_first_line(error)}", flush=True)
                    continue
                known = (
                    bf16.setdefault((fused, tokens), (taken, step))
                    if bits is None
                    else bf16.get((fused, tokens))
                )
                ratios = [
                    other / mine for other, mine in zip(known or (np.nan, np.nan), (taken, step), strict=True)
                ]
                rows.append([
                    name, "cuDNN" if fused and model.fused else "XLA", str(tokens), f"{taken:.3f}",
                    f"{tokens / taken:.0f}", f"{ratios[0]:.2f}", f"{step * 1e6:.0f}", f"{ratios[1]:.2f}",
                ])  # fmt: skip
        del model
        gc.collect()
    return rows


def _table(heads: list[str], rows: list[list[str]]) -> None:
    print()
    for cells in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Read the command line, time, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3-8b", choices=shapes.SHAPES)
    parser.add_argument("--tokens", default="8192,32768", help="lengths of prompts, with commas between them")
    parser.add_argument("--layers", type=int, help="blocks of the models; default: all")
    parser.add_argument("--kv-cache", default="int8", choices=("bfloat16", "int8"))
    parser.add_argument("--steps", action="store_true", help="time decode steps alone")
    options = parser.parse_args()
    xla_flags.disable_triton_gemm()
    lengths, dtype = [int(text) for text in options.tokens.split(",")], jnp.dtype(options.kv_cache)
    config = shapes.SHAPES[options.shape]
    config = dataclasses.replace(
        config,
        num_layers=options.layers or config.num_layers,
        max_position_embeddings=2 * max(lengths),
    )
    print(jax.devices()[0].device_kind, "JAX", jax.__version__, flush=True)
    models = model_rows(config, lengths, dtype, prompts=not options.steps)
    if not options.steps:
        alone = attention_rows(config, max(lengths), dtype)
        _table(["tokens of a chunk", "before it", "cuDNN µs", "XLA µs", "×", "largest difference"], alone)
    heads = [
        "model",
        "attention",
        "tokens",
        "prefill s",
        "tokens/s",
        "× bf16",
        "µs a step behind it",
        "× bf16",
    ]
    print(f"\n{options.shape}, {config.num_layers} layers, cache in {options.kv_cache}")
    _table(heads, models)


if __name__ == "__main__":
    main()
