"""Codes survive packing, at every ragged width, and take the bytes that are claimed."""

import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import packing

WIDTHS = [1, 5, 172, 512, 576, 1536]


@pytest.fixture
def codes(request):
    return np.random.default_rng(0).integers(-1, 2, (2, 3, request.param)).astype(np.int8)


@pytest.mark.parametrize("codes", WIDTHS, indirect=True)
def test_two_bits_round_trip(codes):
    packed = packing.pack(jnp.asarray(codes))
    assert packed.dtype == jnp.uint8
    assert packed.shape == (2, 3, packing.packed_width(codes.shape[-1]))
    np.testing.assert_array_equal(packing.unpack(packed, codes.shape[-1]), codes + 1)


@pytest.mark.parametrize("codes", WIDTHS, indirect=True)
def test_base_three_round_trip(codes):
    packed = packing.pack(jnp.asarray(codes))
    stored = packing.pack_base3(packed, codes.shape[-1])
    assert stored.dtype == jnp.uint8
    assert stored.shape == (2, 3, -(-codes.shape[-1] // 5))
    np.testing.assert_array_equal(packing.unpack_base3(stored, codes.shape[-1]), packed)


def test_layout_is_planar_in_tiles_of_512():
    # Byte c of a tile holds columns c, c+128, c+256, c+384: the layout the kernels read.
    codes = np.random.default_rng(1).integers(-1, 2, (4, 512)).astype(np.int8)
    u = (codes + 1).astype(np.uint8).reshape(4, 4, 128)
    expected = u[:, 0] | u[:, 1] << 2 | u[:, 2] << 4 | u[:, 3] << 6
    np.testing.assert_array_equal(packing.pack(jnp.asarray(codes)), expected)


def test_no_column_is_wasted_at_576():
    assert packing.packed_width(576) * 8 == 2 * 576
