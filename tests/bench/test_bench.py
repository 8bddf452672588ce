"""`twla bench` where there are no kernels: it runs, says so, and counts what it should."""

import json

import jax
import numpy as np
import pytest

from twla_jax.bench import SHAPES, decode, measure, shapes, timing
from twla_jax.cli import main
from twla_jax.core.tensors import dequantize
from twla_jax.errors import TwlaError

SMALL = ["--shape", "tiny", "--layers", "1", "--tokens", "8", "--context", "8", "--steps", "2"]
HEAD = 4  # bits of the ternary models' head

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_call():
    """A time is of as many as may be, and nothing here is about times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_CALLS", 1)
        yield


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the command prints, and its figures."""
    path = tmp_path_factory.mktemp("bench") / "roofline.svg"
    rows = []
    result = measure(
        ("kernels", "prefill", "decode"),
        "tiny",
        layers=1,
        tokens=8,
        context=8,
        steps=2,
        activation_bits=(8, 4),
        embedding_bits=HEAD,
        on_row=lambda part, row: rows.append((part, row)),
    )
    from twla_jax.reports import plotting

    plotting.plot_roofline(path, result)
    return result, rows, path


def test_every_row_comes_as_it_is_measured_and_is_json(printed):
    result, rows, path = printed
    # Decoding before what needs the profiler, which slows it.
    assert [row for _, row in rows] == [
        row for part in ("decode", "kernels", "prefill") for row in result[part]
    ]
    assert json.loads(json.dumps(result)) == result
    assert path.stat().st_size > 0


def test_it_is_said_that_no_kernel_ran(printed):
    assert "XLA reference: there are no kernels for cpu" in printed[0]["path"]


def test_figures_follow_from_each_other(printed):
    result = printed[0]
    row = next(row for row in result["kernels"] if row["name"] == "gate,up, int8")
    n, m = 2 * 1024, 512
    assert (row["rows"], row["columns"]) == (n, m)
    # Two bits a weight, two bytes of (α, μ) for 128 of them, row sums, steps and biases; one token in and out.
    assert row["bytes"] == n * m // 4 + n * m // 64 + 12 * n + m + 2 * n
    assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["microseconds"] * 1e6)
    assert row["copy_fraction"] == pytest.approx(row["bytes_per_second"] / result["copy_bytes_per_second"])
    copied = 1e6 * timing.copy_seconds(row["bytes"])
    assert row["small_copy_fraction"] == pytest.approx(copied / row["microseconds"])
    assert row["speedup_bf16"] == pytest.approx(row["bf16_microseconds"] / row["microseconds"])
    block, parts = result["prefill"][-1], result["prefill"][:-1]
    for key in ("microseconds", "bytes"):
        assert block[key] == pytest.approx(sum(part[key] for part in parts))
    part = parts[1]
    n, m, t = part["rows"], part["columns"], part["tokens"]
    assert part["bytes"] == n * m // 4 + n * m // 64 + 12 * n + t * (m + 2 * n)
    assert [row["name"] for row in result["decode"]] == [
        "bf16",
        *(f"W1.58A{bits}, head of {HEAD} bits" for bits in (8, 4)),
    ]
    for row in result["decode"]:
        assert row["tokens_per_second"] == pytest.approx(1e6 / row["microseconds"])
    # Keys and values of 8 + 1 positions, 4 heads of 64, in bf16.
    assert result["decode"][0]["cache_bytes"] == 2 * 9 * 4 * 64 * 2


def test_random_weights_are_ternary_and_keep_the_scale_of_what_passes():
    w = np.asarray(dequantize(shapes.ternary_tensor(jax.random.key(0), 64, 1024)))
    assert 0.5 < w.std() * 1024**0.5 < 1.5
    assert len(np.unique(w[0, :128])) == 3


def test_8_and_4_bits_are_one_program():
    model = shapes.random_decoder(SHAPES["tiny"], activation_bits=8)
    (_, eight), (_, four) = decode._at_bits(model, [8, 4])
    assert jax.tree.structure(eight) == jax.tree.structure(four)
    levels = [float(each.blocks[1].o_input.settings.get_value()[0]) for each in (eight, four)]
    assert levels == [255, 15]


def test_the_command_prints_tables(capsys):
    main.main(["bench", "decode", *SMALL, "--kv-cache", "int8", "--activation-bits", "16"])
    out = capsys.readouterr().out
    assert out.index("## Whole-model decode") < out.index("| bf16 | 1 | 1 | 8 |") < out.index("| W1.58A16 |")
    assert "XLA reference" in out


def test_a_head_of_fewer_bits_is_counted_as_such(printed):
    rows, (n, m) = printed[0], (256, 512)
    packed, product = rows["decode"][1], rows["kernels"][-1]
    size = n * m * HEAD // 8 + n * m // 128 * 4
    assert product["name"] == f"head of {HEAD} bits, bf16"
    assert product["bytes"] == size + 2 * m + 4 * n
    blocks = shapes.random_decoder(SHAPES["tiny"], activation_bits=8, embedding_bits=HEAD).blocks[0]
    assert packed["weight_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(blocks)) + size


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"shape": "huge"}, "shape 'huge'"),
        ({"layers": 3}, "layers 3: tiny has 1 to 2"),
        ({"steps": 0}, "steps 0"),
        ({"activation_bits": (8, 5)}, "activation bits 5"),
        ({"embedding_bits": 12}, "embedding.bits = 12"),
    ],
)
def test_what_cannot_be_measured_is_named(settings, named):
    with pytest.raises(TwlaError, match=named):
        measure(["decode"], **{"shape": "tiny", **settings})
