"""Weights of eight bits with scales are read as what the format says they stand for, or refused in one line."""

import json
import struct
import types

import ml_dtypes
import numpy as np
import pytest

from twla_jax.errors import TwlaError
from twla_jax.models.io import shards
from twla_jax.models.io.readers import load_model, read_config

NAME = "model.layers.1.mlp.up_proj.weight"
TYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.uint8): "U8",
}


def write(case, folder, **settings):
    """A folder whose safetensors file may hold types that numpy has no name for."""
    quantization = {"quant_method": "fp8", "weight_block_size": [20, 16], **settings}
    (folder / "config.json").write_text(json.dumps({**case.config, "quantization_config": quantization}))
    header, data = {}, b""
    for name, value in case.weights.items():
        start, data = len(data), data + value.tobytes()
        entry = {"dtype": TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, len(data)]}
        header[name] = entry
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def in_eight_bits(case, rng, name, block, scales, kind=ml_dtypes.float8_e4m3fn):
    """Puts random bytes and scales in place of a matrix; returns what they stand for, one product at a time."""
    shape = case.weights[name].shape
    stored = rng.integers(0, 0x70, shape, np.uint8).view(kind)
    stored[0, 0] = -stored[0, 0]
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    scales = scales(grid)
    case.weights[name], case.weights[f"{name}_scale_inv"] = stored, scales
    value = np.zeros(shape)
    for i, j in np.ndindex(shape):
        value[i, j] = float(stored[i, j]) * float(scales.reshape(grid)[i // block[0], j // block[1]])
    return value.astype(np.float32)


@pytest.fixture
def case(golden):
    return golden("llama")


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_block_scales_multiply_their_blocks_also_where_these_are_cut_at_the_edge(case, tmp_path, kind):
    rng = np.random.default_rng(0)

    def scales(grid):
        return rng.uniform(0.001, 0.02, grid).astype(np.float32)

    expected = in_eight_bits(case, rng, NAME, (20, 20), scales, kind)
    model = load_model(write(case, tmp_path, weight_block_size=[20, 20]))
    kernel = model.blocks.up.kernel.get_value()
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], expected.T)
    np.testing.assert_array_equal(
        model.blocks.q.kernel.get_value()[1], case.weights["model.layers.1.self_attn.q_proj.weight"].T
    )


def test_a_header_is_parsed_once_for_all_tensors_in_eight_bits(case, tmp_path, monkeypatch):
    rng, stem = np.random.default_rng(0), "model.layers.1.mlp"
    for name in ("up", "gate"):
        scales = lambda grid: np.ones(grid, np.float32)  # noqa: E731
        in_eight_bits(case, rng, f"{stem}.{name}_proj.weight", (20, 16), scales)
    parsed = []

    def loads(text):
        parsed.append(text)
        return json.loads(text)

    monkeypatch.setattr(shards, "json", types.SimpleNamespace(loads=loads))
    load_model(write(case, tmp_path))
    assert len(parsed) == 1


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, lambda grid: np.full(grid, 0.5, ml_dtypes.bfloat16)),
        (
            {"scale_fmt": "ue8m0"},
            lambda grid: np.exp2(-np.arange(6.0)).reshape(grid).astype(ml_dtypes.float8_e8m0fnu),
        ),
    ],
)
def test_scales_of_other_types_are_read(case, tmp_path, settings, scales):
    expected = in_eight_bits(case, np.random.default_rng(0), NAME, (20, 16), scales)
    model = load_model(write(case, tmp_path, **settings))
    np.testing.assert_array_equal(model.blocks.up.kernel.get_value()[1], expected.T)


def test_scales_that_are_bytes_of_exponents_are_powers_of_two(case, tmp_path):
    rng = np.random.default_rng(0)
    exponents = np.asarray([[120, 127], [125, 128], [0, 119]], np.uint8)
    in_eight_bits(case, rng, NAME, (20, 16), lambda grid: exponents)
    weight = case.weights[NAME].astype(np.float64)
    factors = np.repeat(np.repeat(2.0 ** (exponents.astype(int) - 127), 20, 0)[:48], 16, 1)
    model = load_model(write(case, tmp_path, scale_fmt="ue8m0"))
    np.testing.assert_array_equal(
        model.blocks.up.kernel.get_value()[1], (weight * factors).T.astype(np.float32)
    )


def test_one_scale_of_a_tensor_and_scales_of_activations(case, tmp_path, caplog):
    rng = np.random.default_rng(0)
    expected = in_eight_bits(case, rng, NAME, (48, 32), lambda grid: np.float32(0.25).reshape(()))
    case.weights[NAME.replace("weight", "activation_scale")] = np.ones((), np.float32)
    model = load_model(write(case, tmp_path, weight_block_size=None, activation_scheme="static"))
    np.testing.assert_array_equal(model.blocks.up.kernel.get_value()[1], expected.T)
    assert "1 scales of activations are left out" in caplog.text


def test_fused_matrices_are_scaled_before_they_are_split(golden, tmp_path):
    case, rng = golden("phi3"), np.random.default_rng(0)
    name = "model.layers.0.mlp.gate_up_proj.weight"
    expected = in_eight_bits(
        case, rng, name, (20, 16), lambda grid: rng.uniform(1, 2, grid).astype(np.float32)
    )
    model = load_model(write(case, tmp_path))
    half = len(expected) // 2
    np.testing.assert_array_equal(model.blocks.gate.kernel.get_value()[0], expected[:half].T)
    np.testing.assert_array_equal(model.blocks.up.kernel.get_value()[0], expected[half:].T)


def scaled(case):
    in_eight_bits(case, np.random.default_rng(0), NAME, (20, 16), lambda grid: np.ones(grid, np.float32))
    return f"{NAME}_scale_inv"


def wrong_grid(case):
    case.weights[scaled(case)] = np.ones((2, 2), np.float32)


def without_weight(case):
    del case.weights[scaled(case).removesuffix("_scale_inv")]


def of_16_bits(case):
    scaled(case)
    case.weights[NAME] = np.zeros(case.weights[NAME].shape, np.float16)


def without_scale(case):
    del case.weights[scaled(case)]


def not_a_number(case):
    case.weights[scaled(case)][0, 0] = np.nan


def bytes_as_scales(case):
    case.weights[scaled(case)] = np.ones((3, 2), np.uint8)


def one_scale(case):
    case.weights[scaled(case)] = np.ones((1, 1), np.float32)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (one_scale, {"weight_block_size": [64, 16]}, "has shape [1, 1], not a scale for every 64 × 16"),
        (wrong_grid, {}, "has shape [2, 2], not a scale for every 20 × 16"),
        (wrong_grid, {"weight_block_size": None}, "has shape [2, 2], not a single scale"),
        (without_weight, {}, "has no weight of eight bits beside it"),
        (of_16_bits, {}, "has no weight of eight bits beside it"),
        (without_scale, {}, "is F8_E4M3; supported are F32"),
        (not_a_number, {}, "has 320 NaN or infinite values"),
        (bytes_as_scales, {}, "is U8; supported are F32"),
        (scaled, {"quant_method": "finegrained"}, "its weights are quantised already (finegrained)"),
        (scaled, {"weight_block_size": [20]}, "weight_block_size is a list of 1"),
        (scaled, {"weight_block_size": [0, 20]}, "weight_block_size is a list of 2"),
        (scaled, {"fmt": "e3m4"}, "fmt is 'e3m4'"),
    ],
)
def test_what_does_not_belong_together_is_refused(case, tmp_path, change, settings, message):
    change(case)
    with pytest.raises(TwlaError) as error:
        load_model(write(case, tmp_path, **settings))
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path))


def test_scales_without_settings_that_explain_them_are_refused(case, tmp_path):
    scaled(case)
    write(case, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    with pytest.raises(TwlaError, match=r"quantised already \(FP8"):
        load_model(tmp_path)


def test_float64_is_rounded_to_float32_and_what_is_too_large_is_named(case, tmp_path):
    value = case.weights[NAME].astype(np.float64) * (1 + 1e-12)
    case.weights[NAME] = value
    write(case, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    np.testing.assert_array_equal(
        load_model(tmp_path).blocks.up.kernel.get_value()[1], value.T.astype(np.float32)
    )
    value[3, 4] = 1e300
    write(case, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    with pytest.raises(TwlaError, match=r"up_proj.weight' has 1 NaN or infinite values"):
        load_model(tmp_path)


def test_a_model_in_eight_bits_has_settings_that_can_be_inspected(case, tmp_path):
    scaled(case)
    assert read_config(write(case, tmp_path)).num_layers == 2
