"""Two linears in one op: equal to its two ops, and one kernel where there is one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from twla_jax.bench import shapes
from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.ops.linear_pair import LinearOperands, gpu, linear_pair, new_pair_exchange
from twla_jax.ops.quantized_linear import quantized_linear
from twla_jax.ops.rotate_quantize import gpu_rotation, quantizer_settings
from twla_jax.ops.ternary_matmul.gpu_rows import Rows
from twla_jax.ops.ternary_matmul.ring_tiles import RingTileConfig

from helpers import emulated_machine, emulated_threads
from helpers.emulated_machine import Global
from helpers.token_operands import in_splits, permutation, rotated

SETTINGS = quantizer_settings(4, 0.9)


@functools.partial(jax.jit, static_argnums=range(5))
def operands(t, m, n, hidden, rotate=lambda rotation: rotation):
    keys = jax.random.split(jax.random.key(0), 7)

    def linear(i, n, m, **more):
        rotation = rotate(shapes.rotation_for_kernels(keys[i], m, n))
        return LinearOperands(
            rotation=rotation, settings=SETTINGS, weight=shapes.weight(keys[i + 1], n, m), **more
        )

    scale = (1 + 0.1 * jax.random.normal(keys[4], (n,))).astype(jnp.bfloat16)
    second = linear(2, 2 * hidden, n, norm_scale=scale, epsilon=1e-5)
    weight = dataclasses.replace(second.weight, splits=(hidden, hidden))
    x, residual = (
        jax.random.normal(key, (t, size), jnp.bfloat16) for key, size in zip(keys[5:], (m, n), strict=True)
    )
    return x, linear(0, n, m), dataclasses.replace(second, weight=weight), residual


def abstract(*sizes):
    return jax.eval_shape(lambda: operands(*sizes))


# Two programs: within one, XLA would not round what the first linear passes to the second.
jitted = jax.jit(quantized_linear, static_argnames=("epsilon", "gated"))


def two_ops(x, first, second, residual):
    h = jitted(x, first.rotation, SETTINGS, first.weight, residual=residual)
    norm = {"norm_scale": second.norm_scale, "epsilon": second.epsilon}
    return h, jitted(h, second.rotation, SETTINGS, second.weight, gated=True, **norm)


def test_it_is_its_two_ops():
    given, exchange = operands(2, 1024, 256, 96), jnp.arange(8)[None]
    found, expected = jax.jit(linear_pair)(*given, exchange), jax.jit(two_ops)(*given)
    jax.tree.map(np.testing.assert_array_equal, found, (*expected, exchange))


def emulated(x, first, second, residual, links, before):
    """Run the kernel thread by thread, all blocks at once, on an exchange with the tag `before`."""
    given, blocks = gpu._global_operands(x, first, second, residual), max(link.blocks for link in links)
    exchange = np.array(gpu.new_pair_exchange(residual)).view(np.uint32) + np.uint32(before << 16 | 0x1234)
    outputs = [np.full((1, link.n), np.nan, residual.dtype) for link in links]
    emulated_machine.start(256, blocks, rows=None)
    emulated_machine.machine.axes["rows"] = emulated_machine.machine.blocks
    inputs = (np.array(each) for of_linear in given for each in of_linear)
    gpu._kernel(
        *map(Global, (exchange.view(np.int32), *inputs, *outputs)),
        **emulated_threads.scratch(gpu._scratch_types(links)),
        links=links,
        count=len(given[0]),
    )
    np.testing.assert_array_equal(exchange[:, : residual.size + blocks] >> 16, (before + 1) % 2**16)
    return outputs


@pytest.mark.parametrize(
    ("m", "n", "rows", "rows_of_second", "parts", "before"),
    [
        (1024, 128, 32, 32, False, 0),  # four blocks for both
        (576, 128, 32, 16, True, 2**16 - 1),  # four blocks for the first linear, eight for the second
        (1024, 1000, 200, 40, False, 2**15 - 1),
    ],
)
def test_gpu_kernel_thread_by_thread(m, n, rows, rows_of_second, parts, before, monkeypatch):
    x, first, second, residual = operands(1, m, n, 128, permutation)
    x = in_splits(1, m, m // 64) if parts else x
    expected = two_ops(x, first, second, residual)
    emulated_threads.emulate(monkeypatch)
    emulated_threads.emulate_kernel(monkeypatch, pl)
    monkeypatch.setattr(gpu_rotation, "rotate", rotated)
    links = (
        gpu._link(x, first, Rows(rows, 1), RingTileConfig(rows=rows, warpgroups=2, stages=1)),
        gpu._link(
            residual,
            second,
            Rows(rows_of_second, 2),
            RingTileConfig(rows=rows_of_second, warpgroups=2, stages=2),
        ),
    )
    found = emulated(x, first, second, residual, links, before)
    for one, other in zip(found, expected, strict=True):
        other = np.asarray(other, float)
        # Outputs are rounded before the gate, and sigmoids may round differently.
        np.testing.assert_allclose(np.asarray(one, float), other, atol=1e-2 * np.abs(other).max())


LLAMA, QWEN, SMOLLM = (4096, 4096, 11008), (4096, 4096, 12288), (576, 576, 1536)


@pytest.mark.parametrize("model", [LLAMA, QWEN])
def test_models_of_these_shapes_have_the_kernel(model, monkeypatch):
    given = abstract(1, *model)
    assert gpu.obstacle(*given) is None
    blocks = max(link.blocks for link in gpu._launch_plan(*given))
    assert blocks <= 132
    monkeypatch.setattr(
        gpu, "multiprocessors", lambda: blocks - 1
    )  # one too few for all blocks to be resident
    assert "blocks" in (gpu.obstacle(*given) or "")


@pytest.mark.parametrize(
    ("t", "model", "reason"),
    [(2, LLAMA, "2 tokens"), (1, SMOLLM, "no weights"), (1, (8192, 8192, 28672), "at once")],
)
def test_others_are_two_ops(t, model, reason):
    given = abstract(t, *model)
    assert reason in (gpu.obstacle(*given) or "")
    assert new_pair_exchange(t, *given[1:3]) is None


@pytest.mark.aot
@pytest.mark.parametrize("in_splits", [True, False])
def test_gpu_kernel_spills_nothing(in_splits, compile_for_h100):
    x, first, second, residual = abstract(1, *LLAMA)
    if in_splits:
        x = AttentionSplits(
            mixed=jax.ShapeDtypeStruct((1, 4, 4096), jnp.bfloat16),
            softmax=jax.ShapeDtypeStruct((1, 4, 32, 2), jnp.float32),
        )
    exchange = jax.ShapeDtypeStruct((1, 4096 + 132), jnp.int32)

    _, reports = compile_for_h100(gpu.linear_pair, x, first, second, residual, exchange)
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]
