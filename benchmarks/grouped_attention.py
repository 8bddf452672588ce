"""Checks the attention of new tokens on tensor cores, and times it beside the kernel that does without them.

    python benchmarks/grouped_attention.py

Heads are those of Qwen3-8B, and of LLaMA-2-7B, which share no keys. The check is against the XLA reference, to 1e-2 of
the largest value; times are those of the kernels alone, a layer, over so many caches that none stays in the L2 cache.
The table comes last.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.bench import decode, shapes, timing
from twla_jax.ops.attention.kv_cache import LayerKV, empty_layer, write
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import gpu, reference, split_sizes
from twla_jax.ops.decode_attention.split_sizes import GroupConfig, group_config

_EVERYWHERE = np.iinfo(np.int32).max
_ROUNDS = 3  # over all caches
_EPSILON = 1e-5
# Sequences, heads, key heads, features of a head, room, filled positions, window.
CHECKED = (
    (64, 32, 8, 128, 640, 520, _EVERYWHERE),
    (16, 32, 8, 128, 640, 0, _EVERYWHERE),
    (16, 40, 8, 128, 4096, 3000, 1000),
    (64, 9, 3, 64, 576, 333, 64),
    (48, 24, 3, 256, 300, 260, _EVERYWHERE),
    (16, 32, 32, 128, 576, 512, _EVERYWHERE),
    (1, 32, 8, 128, 8256, 8192, _EVERYWHERE),
    (3, 32, 8, 128, 6000, 5990, 3000),
    (1, 9, 3, 64, 8192, 900, _EVERYWHERE),
)
HEADS, ALONE = (32, 8, 128), (32, 32, 128)
# Heads, sequences and filled positions of what is timed, and the cache.
TIMED = (
    (HEADS, 1, 8192, "int8"),
    (HEADS, 1, 32768, "int8"),
    (HEADS, 1, 32768, "bfloat16"),
    (HEADS, 4, 8192, "int8"),
    (ALONE, 16, 512, "int8"),
    (ALONE, 16, 512, "bfloat16"),
    (HEADS, 16, 512, "int8"),
    (HEADS, 64, 512, "int8"),
    (HEADS, 128, 512, "int8"),
    (HEADS, 64, 4096, "int8"),
    (HEADS, 16, 512, "bfloat16"),
    (HEADS, 64, 512, "bfloat16"),
)


def operands(b: int, heads: int, kv_heads: int, d: int, size: int, length: int, dtype):
    """Returns heads, a cache, positions, every sequence at one of its own, and weights of norms."""
    keys = jax.random.split(jax.random.key(6), 3)
    qkv = jax.random.normal(keys[0], (b, heads + 2 * kv_heads, d), jnp.bfloat16)
    angles = jax.random.normal(keys[1], (b, 1, d // 2))
    own = jnp.maximum(length - 7 * (jnp.arange(b, dtype=jnp.int32) % 8), 0)[:, None]
    positions = Positions(query=own, key=jnp.arange(size), cos=jnp.cos(angles), sin=jnp.sin(angles))
    scales = jnp.linspace(0.5, 1.5, d), jnp.linspace(1.5, 0.5, d)
    return qkv, cache_layer(keys[2], b, kv_heads, size, d, dtype), positions, scales


def cache_layer(key, b: int, kv_heads: int, size: int, d: int, dtype) -> LayerKV:
    """Returns a layer of random keys and values."""
    shape = (2, b, kv_heads, size, d)
    keys, values = jax.random.normal(key, shape, jnp.bfloat16).swapaxes(2, 3)
    return write(empty_layer(shape, dtype), keys, values, jnp.int32(0))


def rule(b: int, heads: int, kv_heads: int, d: int, size: int, dtype) -> GroupConfig:
    """Returns the split that the rule gives."""
    config = group_config(b * heads, heads // kv_heads, size, d, quantized=jnp.dtype(dtype) == jnp.int8)
    if config is None:
        raise ValueError(f"{b} sequences of {heads} heads do not take tensor cores")
    return config


def check(kernel, cases=CHECKED) -> None:
    """The mix and the cache, as the reference has them; entries past the filled ones are NaN, or anything."""
    for case in cases:
        for dtype in ("int8", "bfloat16"):
            check_case(kernel, case, dtype)


def check_case(kernel, case, dtype: str) -> None:
    """Prints whether one case is right, and how far it is off."""
    b, heads, kv_heads, d, size, length, window = case
    qkv, layer, positions, scales = jax.jit(lambda: operands(b, heads, kv_heads, d, size, length, dtype))()
    config = rule(b, heads, kv_heads, d, size, dtype)
    arguments = (qkv, layer, positions, jnp.int32(window), scales)
    expected, written = jax.jit(functools.partial(reference.decode_attention, epsilon=_EPSILON))(*arguments)
    place = jnp.arange(size) - positions.query[:, :1, None]  # of sequence and key head
    anything = jnp.asarray(-128 if layer.scales is not None else jnp.nan, layer.entries.dtype)
    garbage = LayerKV(
        entries=jnp.where((place >= 0)[..., None], anything, layer.entries),
        scales=None if layer.scales is None else jnp.where(place >= 0, jnp.nan, layer.scales),
    )
    op = jax.jit(functools.partial(kernel, epsilon=_EPSILON, config=config))
    found, cache = op(qkv, garbage, *arguments[2:])
    found, expected = (np.asarray(each.astype(jnp.float32), np.float64) for each in (found, expected))
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    same = _difference(cache, written, place > 0)
    verdict = "right" if error <= 1e-2 and same <= 1 else "WRONG"
    print(
        f"{verdict}: {b} sequences, {heads}/{kv_heads} heads of {d}, {length} of {size} positions, {dtype}:"
        f" error {error:.1e} of the largest value, cache {same:g} steps off",
        flush=True,
    )


def _difference(cache: LayerKV, written: LayerKV, past) -> float:
    """Returns the largest difference of entries, in units of bf16 numbers or codes, and of scales likewise."""
    worst = 0.0
    for new, same in zip(*map(jax.tree.leaves, (cache.stores, written.stores)), strict=True):
        new, same = (np.asarray(each.astype(jnp.float32), np.float64) for each in (new, same))
        seen = np.broadcast_to(
            ~np.asarray(past)[..., None] if new.ndim == 5 else ~np.asarray(past), new.shape
        )
        # Where the norm is rounded may move a number of bf16 by a step, and its rotation both of a pair.
        half = np.roll(same, same.shape[-1] // 2, -1) if new.ndim == 5 else 0
        unit = 1.0 if cache.scales is not None and new.ndim == 5 else 2**-6 * np.hypot(same, half) + 1e-6
        worst = max(worst, float((np.abs(new - same) / unit)[seen].max()))
    return worst


def seconds(op, of: tuple[int, int, int], b: int, length: int, dtype) -> float:
    """Returns the seconds of an op on so many heads, key heads and features, in a loop that updates caches in place."""
    heads, kv_heads, d = of
    size = -(-(length + 1) // 64) * 64
    qkv, layer, positions, scales = jax.jit(lambda: operands(b, heads, kv_heads, d, size, length, dtype))()
    size_of_layer = sum(leaf.nbytes for leaf in jax.tree.leaves(layer))
    copies = int(timing.ROTATED_BYTES / size_of_layer) + 1 if timing.on_gpu() else 1
    layers = tuple(jax.tree.map(jnp.copy, layer) for _ in range(copies))
    positions = Positions(
        query=jnp.full((b, 1), length, jnp.int32), key=positions.key, cos=positions.cos, sin=positions.sin
    )
    one = jax.jit(lambda layer, qkv, *more: op(qkv, layer, *more, jnp.int32(_EVERYWHERE), scales))

    def run(layers, qkv, positions):
        def step(_, carry):
            mixed, layers = zip(*(one(layer, qkv, positions) for layer in carry[1]), strict=True)
            return mixed, layers

        mixed = (jnp.zeros((b, heads * d), qkv.dtype),) * copies
        return jax.lax.fori_loop(0, _ROUNDS, step, (mixed, layers))

    return timing.seconds(run, layers, qkv, positions) / (copies * _ROUNDS)


def others(config: GroupConfig, size: int) -> list[GroupConfig]:
    """Returns splits beside the one that the rule gives, for entries of so many bytes."""
    found = [
        GroupConfig(queries=config.queries, warps=w, groups=g) for w, g in ((4, 1), (8, 1), (4, 2), (4, 4))
    ]
    found += [GroupConfig(queries=config.queries, warps=w, groups=g) for w, g in ((8, 2), (16, 1))]
    return [each for each in found if each != config and each.warps * each.groups * size <= 16 * HEADS[2]]


def step_times(sequences: int, layers: int = 8) -> list[float]:
    """Returns the seconds of a decode step of some layers of Qwen3-8B without tensor cores, and with them."""
    config = dataclasses.replace(shapes.SHAPES["qwen3-8b"], num_layers=layers)
    settings = decode.DecodeSettings(cache_dtype=jnp.int8)
    before, found = split_sizes.group_config, []
    for on in (False, True):
        split_sizes.group_config = before if on else lambda *_, **__: None
        jax.clear_caches()
        model = shapes.random_decoder(config, activation_bits=4, embedding_bits=4)
        found.append(decode.step_seconds(model, sequences, settings))
        del model
    split_sizes.group_config = before
    return found


def main() -> None:
    """Checks, times, and prints the table."""
    parser = argparse.ArgumentParser(description="Checks and times attention on tensor cores.")
    parser.add_argument("--tune", action="store_true", help="time other splits too")
    parser.add_argument("--unchecked", action="store_true", help="time only")
    parser.add_argument("--step", action="store_true", help="time decode steps of eight layers too")
    arguments = parser.parse_args()
    if not arguments.unchecked:
        check(gpu.decode_attention)
    lines = [
        "heads, sequences, context, cache     | thread by thread | tensor cores | bytes take, at the copy's rate"
    ]
    rate = timing.copy_bandwidth()
    for of, b, length, dtype in TIMED:
        heads, kv_heads, d = of
        config = rule(b, heads, kv_heads, d, length, dtype)
        plain = split_sizes.split_config(
            b * heads, heads // kv_heads, length, d, quantized=jnp.dtype(dtype) == jnp.int8
        )
        ops = [
            functools.partial(gpu.decode_attention, epsilon=_EPSILON, config=each) for each in (plain, config)
        ]
        old, new = (seconds(op, of, b, length, dtype) * 1e6 for op in ops)
        least = 2 * b * kv_heads * length * (d * jnp.dtype(dtype).itemsize + 4 * (dtype == "int8"))
        split = f"{config.warps:2} warps x {config.groups * config.splits:2}"
        line = f"{heads:2}/{kv_heads:2} {b:4} {length:5} {dtype:9} {split} | {old:7.1f} µs | {new:7.1f} µs"
        lines.append(f"{line} | {least / rate * 1e6:7.1f} µs")
        print(lines[-1], flush=True)
        if arguments.tune and length == 512 and of == HEADS:
            for other in others(config, d * jnp.dtype(dtype).itemsize):
                op = functools.partial(gpu.decode_attention, epsilon=_EPSILON, config=other)
                taken = seconds(op, of, b, length, dtype)
                lines.append(f"     {other.warps:2} warps x {other.groups}: {taken * 1e6:.1f} µs")
                print(lines[-1], flush=True)
    print("\n".join(lines))
    if arguments.step:
        for sequences in (64, 16):
            off, on = (1e6 * each for each in step_times(sequences))
            line = (
                f"8 layers of Qwen3-8B, {sequences} sequences: {off:.0f} µs a step, {on:.0f} on tensor cores"
            )
            print(line, flush=True)


if __name__ == "__main__":
    main()
