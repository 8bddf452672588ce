"""Products with the matrices of each token's experts: against numpy in float64, XLA's ragged product and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import tensors
from twla_jax.ops.expert_matmul import block_products, block_size, expert_blocks, expert_matmul, gpu, tpu
from twla_jax.ops.ternary_matmul import kernel_weight
from twla_jax.ops.tokens import QuantizedTokens

from helpers.ternary_operands import matrix, tokens

EXPERTS = 5


def choices(t, k, seed=0):
    """The experts of each token, all different, of which the last is never chosen."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(EXPERTS - 1)[:k] for _ in range(t)]).astype(np.int32)


def weights(n, m, size):
    """The matrices of all experts, one by one and stacked for the kernels."""
    each = [matrix(n, m, size, seed=seed) for seed in range(EXPERTS)]
    return each, _stacked(each)


@jax.jit
def _stacked(each):
    """One program; its operations would each be compiled for every shape."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return jax.vmap(lambda one: kernel_weight([one]))(stacked)


@pytest.mark.parametrize(("count", "size"), [(7, 1), (7, 16), (100, 8), (300, 32)])
def test_every_choice_has_one_row_in_a_block_of_its_expert(count, size):
    chosen = np.random.default_rng(1).integers(0, EXPERTS - 1, count).astype(np.int32)
    blocks = expert_blocks(jnp.asarray(chosen), EXPERTS, size)
    places = np.asarray(blocks.places)
    assert len(set(places)) == count
    np.testing.assert_array_equal(np.asarray(blocks.experts)[places // size], chosen)
    rows = np.asarray(blocks.choices)
    np.testing.assert_array_equal(rows[places], np.arange(count))
    assert (np.delete(rows, places) == count).all()
    assert len(rows) <= size * count
    assert count <= 64 or len(rows) < count + EXPERTS * size
    x = jnp.arange(1.0, count + 1)[:, None]
    np.testing.assert_array_equal(blocks.scatter(blocks.gather(x)), x)


def test_blocks_are_about_as_long_as_an_expert_has_tokens():
    assert block_size(64, 128) == 1
    assert block_size(8192 * 8, 128) == 128
    assert block_size(1000, 128) == 8
    assert block_size(1000, 128, least=16, most=16) == 16


@pytest.mark.parametrize("kind", ["int8", "float32"])
@pytest.mark.parametrize("t", [2, 40])
def test_packed_products_are_those_with_each_expert_s_dequantised_matrix(kind, t):
    n, m = 96, 576
    each, stacked = weights(n, m, 128)
    experts = choices(t, 2)
    x = tokens(t, m) if kind == "int8" else jax.random.normal(jax.random.key(1), (t, m))
    y = jax.jit(functools.partial(expert_matmul, out_dtype=jnp.float32, implementation="xla"))(
        x, stacked, experts
    )
    values = np.asarray(x.dequantize() if isinstance(x, QuantizedTokens) else x, np.float64)
    dense = np.stack([np.asarray(jax.jit(tensors.dequantize)(one), np.float64) for one in each])
    expected = np.einsum("tm,tknm->tkn", values, dense[experts])
    np.testing.assert_allclose(y, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("t", "size"), [(3, 128), (40, 576)])
def test_tpu_kernel_reads_each_block_s_own_matrix(t, size, monkeypatch):
    _, stacked = weights(96, 576, size)
    monkeypatch.setattr(tpu, "products", functools.partial(tpu.products, interpret=True))
    ops = (
        jax.jit(functools.partial(expert_matmul, out_dtype=jnp.float32, implementation=implementation))
        for implementation in ("tpu", "xla")
    )
    found, expected = (op(tokens(t, 576), stacked, choices(t, 2)) for op in ops)
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


def test_gradients_are_those_of_a_ragged_product():
    sizes, size = jnp.array([16, 0, 32, 16]), 16
    x, slope = (jax.random.normal(jax.random.key(seed), (64, n)) for seed, n in ((0, 12), (1, 20)))
    kernel = jax.random.normal(jax.random.key(2), (4, 12, 20))
    of_block = jnp.array([0, 2, 2, 3])

    def blocked(x, kernel):
        return (block_products(x.reshape(4, size, -1), kernel, of_block).reshape(64, -1) * slope).sum()

    def ragged(x, kernel):
        return (jax.lax.ragged_dot(x, kernel, sizes, precision="highest") * slope).sum()

    found, expected = (jax.grad(function, (0, 1))(x, kernel) for function in (blocked, ragged))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.aot
def test_it_compiles_for_a_tpu(compile_for):
    compiled = compile_for("v5e", tpu.products, *_shapes(2, 32))
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.aot
def test_it_compiles_for_an_h100_without_spills(compile_for_h100):
    compiled, reports = compile_for_h100(gpu.products, *_shapes(8, 16))
    assert "mosaic_gpu" in compiled.as_text()
    assert reports
    assert all(line.endswith("0 bytes spill stores, 0 bytes spill loads") for line in reports)


def _shapes(count, size):
    """The operands of `count` blocks with the experts of Qwen3-30B-A3B, gate and up in one."""
    m, n, experts = 2048, 2 * 768, 128

    def make():
        weight = jax.vmap(lambda key: kernel_weight([_ternary(key, n, m)]))(
            jax.random.split(jax.random.key(0), experts)
        )
        return jnp.zeros((count, size, m), jnp.int8), weight, jnp.zeros(count, jnp.int32)

    return jax.eval_shape(make)


def _ternary(key, n, m):
    from twla_jax.bench.shapes import ternary_tensor

    return ternary_tensor(key, n, m)
