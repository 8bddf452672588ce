"""Attention of one new token on TPUs: against float64, and compiled for chips that are not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.ops.attention.kv_cache import empty_layer
from twla_jax.ops.decode_attention import tpu
from twla_jax.ops.decode_attention.tpu_groups import LANES, GroupShape, block_size

from helpers.decode_attention import ALL, check, check_integers, operands

by_tpu_kernel = jax.jit(functools.partial(tpu.decode_attention, interpret=True), static_argnames="epsilon")


@pytest.mark.parametrize(
    ("test", "case"),
    [
        (check_integers, (1, 8, 8, 128, 128, 100, ALL)),  # a group of eight heads
        (check_integers, (1, 10, 2, 128, 200, 199, 60)),  # rows of a group, and positions, are filled up
        (check, (1, 4, 2, 128, 200, 199, ALL)),  # past the end of a bf16 cache are NaN
    ],
)
def test_the_kernel_equals_float64(test, case, monkeypatch):
    monkeypatch.setattr(tpu, "_BLOCK_BYTES", 1)  # blocks of 128 positions
    test(by_tpu_kernel, norm=False, case=case)


def test_every_sequence_may_be_at_a_position_of_its_own():
    q, layer, _, _, _ = operands(2, 2, 2, 128, 200, 199, ALL)
    attend = jax.jit(functools.partial(tpu.attend, interpret=True))
    window, lengths = jnp.full(1, 50), jnp.asarray([3, 150])
    both = attend(q[:, :2], layer, lengths, window)
    for row in range(2):
        same = attend(q[:, :2], layer, jnp.full(2, lengths[row]), window)
        np.testing.assert_array_equal(np.asarray(both[row]), np.asarray(same[row]))


@pytest.mark.parametrize("shared", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("kv_heads", [1, 2, 6, 8, 32])
def test_groups_hold_all_queries_and_blocks_all_positions(shared, kv_heads):
    for size in (64, 640, 1000, 4096):
        block = block_size(kv_heads, size, 128, 512 * 1024)
        assert block % LANES == 0
        assert block == LANES or (block - LANES < size and kv_heads * block * 128 <= 512 * 1024)
        shape = GroupShape(heads=shared * kv_heads, kv_heads=kv_heads, size=size, block=block)
        assert [head for group in range(shape.groups) for head in shape.heads_of(group)] == [*range(kv_heads)]
        assert shape.together * shared <= shape.rows


@pytest.mark.aot
@pytest.mark.parametrize(("target", "kv_heads", "dtype"), [("v5e", 32, jnp.int8), ("v6e", 8, jnp.bfloat16)])
def test_the_cache_is_read_where_it_is(target, kv_heads, dtype, compile_for):
    layer = jax.eval_shape(lambda: empty_layer((2, 8, kv_heads, 640, 128), dtype))
    q, at = jax.ShapeDtypeStruct((8, 32, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = compile_for(target, tpu.attend, q, layer, at, at)
    assert compiled.memory_analysis().temp_size_in_bytes < 1e6
