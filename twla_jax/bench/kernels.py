"""Times each op alone, at the matrices of a shape: few tokens (decode) or many (prefill)."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from twla_jax.bench import shapes, timing
from twla_jax.bench.in_place import (
    CONTEXT,
    attention_seconds,
    cache_layer,
    linear_pair_seconds,
    qkv_attention_seconds,
)
from twla_jax.core.activation import OFF
from twla_jax.models.config import DecoderConfig
from twla_jax.ops.integer_matmul import integer_matmul
from twla_jax.ops.quantized_linear import quantized_linear
from twla_jax.ops.rotate_quantize import quantizer_settings, rotate_quantize
from twla_jax.ops.ternary_matmul import ternary_matmul

Row = dict[str, Any]
_LEAST_COPY = 1e5  # bytes below which memory does not limit an op


def decode_rows(
    config: DecoderConfig, batch: int, kinds: Sequence[str], embedding_bits: int = OFF
) -> Iterator[Row]:
    """Yield rows for every matrix (codes alone, codes with what makes them, bf16), and for every `rotate_quantize`.

    Then attention, and the LM head where it is of less than 16 bits.
    """
    for name, (n, m) in shapes.matrices(config).items():
        base = _xla(n, m, batch)
        make = functools.partial(shapes.weight, n=n, m=m)
        size = shapes.bytes_of(make)
        for label in kinds:
            tokens = shapes.tokens if label == "int8" else shapes.activations
            taken = timing.seconds_each(_product, _with_input(make, tokens, batch, m), size)
            yield _row(
                f"{name}, {label}", n, m, batch, taken, size + batch * (_itemsize(label) * m + 2 * n), base
            )
        if "int8" in kinds:
            rotation = shapes.rotation_for_kernels(jax.random.key(2), m, n)
            whole = functools.partial(_whole_linear, rotation=rotation)
            taken = timing.seconds_each(whole, _with_input(make, shapes.activations, batch, m), size)
            yield _row(f"{name}, from bf16 to int8", n, m, batch, taken, size + batch * (2 * m + 2 * n), base)
    for m, (n, names) in _inputs(config).items():
        taken, xla = (_rotation_seconds(m, n, batch, implementation) for implementation in (None, "xla"))
        size = batch * (2 + 1) * m
        row = _row(f"rotate_quantize {names}", m, m, batch, taken, size, {})
        yield {**row, "xla_microseconds": xla * 1e6, "speedup_xla": xla / taken}
    width = config.num_heads * config.head_dim
    for label, dtype in (("", jnp.bfloat16), (", int8 cache", jnp.int8)):
        taken, xla = (
            attention_seconds(config, batch, dtype, implementation) for implementation in (None, "xla")
        )
        size = shapes.bytes_of(lambda key, dtype=dtype: cache_layer(key, config, batch, CONTEXT, dtype))
        row = _row(f"attention to {CONTEXT}{label}", width, 2 * CONTEXT, batch, taken, size, {})
        yield {**row, "xla_microseconds": xla * 1e6, "speedup_xla": xla / taken}
        if batch == 1 and (taken := qkv_attention_seconds(config, dtype)):
            n, m = shapes.matrices(config)["q,k,v"]
            size += shapes.bytes_of(functools.partial(shapes.weight, n=n, m=m)) + 2 * m
            yield _row(f"q,k,v and attention{label}, from bf16", n, m, batch, taken, size, {})
    if batch == 1 and (taken := linear_pair_seconds(config)):
        sizes = [shapes.matrices(config)[name] for name in ("o", "gate,up")]
        size = sum(shapes.bytes_of(functools.partial(shapes.weight, n=n, m=m)) for n, m in sizes)
        (n, _), (more, m) = sizes
        yield _row("o, gate and up, from bf16", n + more, m, batch, taken, size + 2 * n + more, {})
    if embedding_bits < OFF:
        yield _head_row(config.vocab_size, config.hidden_size, batch, embedding_bits)


def _head_row(n: int, m: int, batch: int, bits: int) -> Row:
    make = functools.partial(shapes.head, n=n, m=m, bits=bits)
    size = shapes.bytes_of(make)
    product = functools.partial(integer_matmul, out_dtype=jnp.float32)
    made = _with_input(make, shapes.activations, batch, m)
    taken = timing.seconds_each(lambda w, x: product(x, w), made, size)
    return _row(
        f"head of {bits} bits, bf16",
        n,
        m,
        batch,
        taken,
        size + batch * (2 * m + 4 * n),
        _xla(n, m, batch),
    )


def _with_input(make, tokens, t: int, m: int):
    """Return a function that makes a weight and an input of its own from a key."""
    return lambda key: (make(key), tokens(key, t, m))


def _product(weight, x):
    return ternary_matmul(x, weight)


def _whole_linear(weight, x, *, rotation):
    """Return the product with rotation and codes included."""
    return quantized_linear(x, rotation, quantizer_settings(8, 0.9), weight)


def prefill_rows(config: DecoderConfig, tokens: int) -> Iterator[Row]:
    """Yield a row for every matrix, alone and with its input's rotation and codes; then one for a whole block."""
    total = {"product": 0.0, "whole": 0.0, "bf16": 0.0, "int8": 0.0}
    work = moved = 0
    for name, (n, m) in shapes.matrices(config).items():
        base = _xla(n, m, tokens)
        make = functools.partial(shapes.weight, n=n, m=m)
        size = shapes.bytes_of(make)
        # Two operands will do: the products are bound by arithmetic.
        of_each = max(size, 150_000_000)
        product = timing.seconds_each(_product, _with_input(make, shapes.tokens, tokens, m), of_each)
        size += tokens * (m + 2 * n)
        whole = product + _rotation_seconds(m, n, tokens, None)
        work, moved = work + 2 * n * m * tokens, moved + size
        for key, value in zip(total, (product, whole, base["bf16"], base["int8"]), strict=True):
            total[key] += value
        yield _prefill_row(name, n, m, tokens, 2 * n * m * tokens, size, product, whole, base)
    base = {"bf16": total["bf16"], "int8": total["int8"]}
    yield _prefill_row("block", 0, 0, tokens, work, moved, total["product"], total["whole"], base)


def _prefill_row(name, n, m, tokens, work, size, product, whole, base) -> Row:
    return {
        "name": name,
        "rows": n,
        "columns": m,
        "tokens": tokens,
        "operations": work,
        "bytes": size,
        "microseconds": product * 1e6,
        "with_rotation_microseconds": whole * 1e6,
        "bf16_microseconds": base["bf16"] * 1e6,
        "int8_microseconds": base["int8"] * 1e6,
        "tera_operations_per_second": work / product / 1e12,
        "product_over_int8": base["int8"] / product,
        "speedup_bf16": base["bf16"] / whole,
    }


def _row(name, n, m, tokens, taken, size, base) -> Row:
    rate = size / taken
    row = {"name": name, "rows": n, "columns": m, "tokens": tokens, "bytes": size}
    row |= {"operations": 2 * n * m * tokens, "microseconds": taken * 1e6, "bytes_per_second": rate}
    row["copy_fraction"] = rate / timing.copy_bandwidth()
    if size >= _LEAST_COPY:
        row["small_copy_fraction"] = timing.copy_seconds(size) / taken
    for kind, other in base.items():
        row |= {f"{kind}_microseconds": other * 1e6, f"speedup_{kind}": other / taken}
    return row


@functools.cache
def _xla(n: int, m: int, tokens: int) -> dict[str, float]:
    """Return the seconds of XLA's own products of these sizes."""

    def measure(dtype):
        def make(key):
            sizes = ((n, m), (tokens, m))
            return [jax.random.randint(key, size, -127, 128, jnp.int8).astype(dtype) for size in sizes]

        return timing.seconds_each(timing.dense_product, make, n * m * jnp.dtype(dtype).itemsize)

    return {"bf16": measure(jnp.bfloat16), "int8": measure(jnp.int8)}


@functools.cache
def _rotation_seconds(m: int, n: int, tokens: int, implementation) -> float:
    rotation = shapes.rotation_for_kernels(jax.random.key(2), m, n)
    function = functools.partial(rotate_quantize, implementation=implementation)
    return timing.seconds(
        function, shapes.activations(jax.random.key(3), tokens, m), rotation, quantizer_settings(8, 0.9)
    )


def _inputs(config: DecoderConfig) -> dict[int, tuple[int, str]]:
    """Return the widths of the inputs, each with the rows of a matrix that reads it and the names of all that do."""
    found: dict[int, tuple[int, str]] = {}
    for name, (n, m) in shapes.matrices(config).items():
        found[m] = (n, f"{found[m][1]}; {name}" if m in found else name)
    return found


def _itemsize(label: str) -> int:
    return 1 if label == "int8" else 2
