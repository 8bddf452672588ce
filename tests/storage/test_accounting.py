"""The sizes that are printed are the sizes that are stored."""

import math

import pytest

from twla_jax.recipe import Recipe
from twla_jax.storage import accounting, checkpoint


@pytest.fixture
def account(tiny_ternary, tmp_path):
    checkpoint.save(tiny_ternary, None, tmp_path / "out", Recipe(), {"note": "x" * 1000})
    return accounting.account(tmp_path / "out")


def test_the_total_is_the_bytes_on_disk(account):
    assert account["bytes_accounted"] == account["bytes_on_disk"]
    assert sum(account["breakdown"].values()) == account["bytes_on_disk"]


def test_bits_follow_from_the_layout(account):
    # q, k, v, o, gate, up, down of a block: rows, columns
    shapes = [(42, 42), (14, 42), (14, 42), (42, 42), (78, 42), (78, 42), (42, 78)]
    codes = 3 * sum(rows * math.ceil(columns / 5) for rows, columns in shapes)
    scales = 3 * sum(rows * math.ceil(columns / 16) * 4 for rows, columns in shapes)
    rotations = 3 * (3 * (6 * 6 + 7 * 7) + 6 * 6 + 13 * 13) * 2
    clips = 3 * 4 * (4 * 2 + 4)
    breakdown = account["breakdown"]
    assert (breakdown["codes"], breakdown["scales_and_offsets"]) == (codes, scales)
    assert (breakdown["rotations"], breakdown["clips"], breakdown["bitmaps"]) == (rotations, clips, 0)
    weights = 3 * sum(rows * columns for rows, columns in shapes)
    assert account["quantized_weights"] == weights
    assert account["bits_per_weight_linear"] == pytest.approx(
        8 * (codes + scales + rotations + clips) / weights
    )


def test_a_tied_embedding_counts_once(account):
    unquantised = 97 * 42 + 42 + 3 * 2 * 42  # embedding, final norm, two norms a block
    assert account["breakdown"]["unquantised"] == 2 * unquantised
    assert account["weights"] == account["quantized_weights"] + unquantised


def test_layers_add_up_to_the_blocks(account):
    assert len(account["per_layer"]) == 3
    for category in ("codes", "scales_and_offsets", "rotations", "clips"):
        assert sum(layer[category] for layer in account["per_layer"]) == account["breakdown"][category]


def test_plain_integers_are_sized_with_their_scales_and_zero_points(account):
    rows, weights = 3 * (42 + 14 + 14 + 42 + 78 + 78 + 42), account["quantized_weights"]
    assert account["plain_int4_g128"]["bits_per_weight_linear"] == pytest.approx(4 + 20 * rows / weights)
    assert account["plain_int3_g128"]["bits_per_weight_linear"] == pytest.approx(3 + 19 * rows / weights)


def test_the_text_shows_every_category(account):
    text = accounting.format_account(account)
    for words in ("codes", "scales and offsets", "rotations", "unquantised", "bytes on disk", "INT4", "INT3"):
        assert words in text
