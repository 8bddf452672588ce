"""Experts in MXFP4 are read as what the format says they stand for, or refused in one line."""

import ml_dtypes
import numpy as np
import pytest

from twla_jax.errors import TwlaError
from twla_jax.models.io import mxfp4
from twla_jax.models.io.huggingface import load_model, read_config

from helpers.golden import GOLDENS

STEM = "model.layers.1.mlp.experts"
POSITIVE = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def written_out(blocks, scales):
    """Every value by itself, in float64, `[experts, out, in]`."""
    experts, rows, groups = scales.shape
    result = np.zeros((experts, rows, groups * 32))
    for expert, row, group in np.ndindex(scales.shape):
        for index in range(32):
            byte = int(blocks[expert, row, group, index // 2])
            four = byte >> 4 if index % 2 else byte & 15
            sign = -1.0 if four & 8 else 1.0
            exponent = int(scales[expert, row, group]) - 127
            result[expert, row, group * 32 + index] = sign * POSITIVE[four & 7] * 2.0**exponent
    return result


def test_every_byte_is_what_the_format_and_transformers_make_of_it():
    stored = np.load(GOLDENS / "generated" / "mxfp4.npz")
    assert {*range(256)} <= {*stored["blocks"].reshape(-1)}
    found = mxfp4.dequantize(stored["blocks"], stored["scales"])
    assert found.dtype == ml_dtypes.bfloat16
    expected = written_out(stored["blocks"], stored["scales"])
    expected[np.abs(expected) >= 2.0**128] *= np.inf  # beyond bfloat16
    np.testing.assert_array_equal(found.astype(float), expected)
    # transformers turns the matrices over, `[experts, in, out]`; bits, so that the sign of zero counts.
    np.testing.assert_array_equal(found.swapaxes(1, 2).view(np.uint16), stored["bits"])


@pytest.fixture
def case(golden):
    """A model whose experts in the second layer are in MXFP4, of 32 and 64 inputs."""
    case = golden("gpt_oss")
    case.config |= {"intermediate_size": 64, "quantization_config": {"quant_method": "mxfp4"}}
    rng = np.random.default_rng(0)
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        for name, shape in (("gate_up_proj", (4, 32, 128)), ("down_proj", (4, 64, 32))):
            case.weights[f"{stem}.{name}"] = rng.normal(size=shape).astype(np.float16)
            case.weights[f"{stem}.{name}_bias"] = rng.normal(size=(4, shape[-1])).astype(np.float16)
    for name, rows, groups in (("gate_up_proj", 128, 1), ("down_proj", 32, 2)):
        del case.weights[f"{STEM}.{name}"]
        case.weights[f"{STEM}.{name}_blocks"] = rng.integers(0, 256, (4, rows, groups, 16), np.uint8)
        case.weights[f"{STEM}.{name}_scales"] = rng.integers(118, 126, (4, rows, groups), np.uint8)
    return case


@pytest.mark.parametrize("in_files", [False, True])
def test_the_experts_of_a_folder_are_those_that_the_blocks_stand_for(case, tmp_path, in_files):
    blocks = load_model(case.write(tmp_path), in_files=in_files).blocks
    rows = written_out(
        case.weights[f"{STEM}.gate_up_proj_blocks"], case.weights[f"{STEM}.gate_up_proj_scales"]
    )
    down = written_out(case.weights[f"{STEM}.down_proj_blocks"], case.weights[f"{STEM}.down_proj_scales"])
    for name, expected in (("gate", rows[:, ::2]), ("up", rows[:, 1::2]), ("down", down)):
        kernel = np.asarray(getattr(blocks, name).kernel.get_value()[1])
        np.testing.assert_array_equal(kernel.astype(float), expected.swapaxes(1, 2))
    # The first layer's are not packed: gates and ups in turn, inputs first.
    plain = case.weights["model.layers.0.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(np.asarray(blocks.up.kernel.get_value()[0]), plain[..., 1::2])
    biases = case.weights[f"{STEM}.gate_up_proj_bias"]
    np.testing.assert_array_equal(blocks.gate.bias.get_value()[1], biases[:, ::2])
    np.testing.assert_array_equal(blocks.up.bias.get_value()[1], biases[:, 1::2])


def without_scales(weights):
    del weights[f"{STEM}.down_proj_scales"]


def of_other_blocks(weights):
    weights[f"{STEM}.down_proj_scales"] = weights[f"{STEM}.down_proj_scales"][:, :, :1]


def of_another_type(weights):
    weights[f"{STEM}.down_proj_scales"] = weights[f"{STEM}.down_proj_scales"].astype(np.int8)


def beside_numbers(weights):
    weights[f"{STEM}.down_proj"] = np.zeros((4, 64, 32), np.float16)


def not_a_number(weights):
    weights[f"{STEM}.down_proj_scales"][0, 0, 0] = 255


def infinite(weights):
    weights[f"{STEM}.down_proj_scales"][0, 0, 0] = 254
    weights[f"{STEM}.down_proj_blocks"][0, 0, 0] = 0x77


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_scales, "'{0}_blocks' has no '{0}_scales' beside it"),
        (of_other_blocks, "'{0}_blocks' has shape [4, 32, 2, 16], and '{0}_scales' [4, 32, 1]"),
        (of_another_type, "'{0}_scales' is I8, not U8"),
        (beside_numbers, "'{0}_blocks' stands beside '{0}'"),
        (not_a_number, "'{0}' has 32 NaN or infinite values"),
        (infinite, "'{0}' has 32 NaN or infinite values"),
    ],
)
def test_what_the_blocks_do_not_say_is_refused(case, tmp_path, change, message):
    change(case.weights)
    with pytest.raises(TwlaError) as error:
        load_model(case.write(tmp_path))
    assert str(error.value) == f"{tmp_path / 'model.safetensors'}: tensor " + message.format(
        f"{STEM}.down_proj"
    )


def test_blocks_that_the_configuration_does_not_tell_of_are_refused(case, tmp_path):
    del case.config["quantization_config"]
    with pytest.raises(TwlaError, match=r"quantised already \(MXFP4, tensor"):
        load_model(case.write(tmp_path))


def test_a_published_configuration_is_read(golden, tmp_path):
    """The keys of gpt-oss-20b's, those of transformers 4 among them."""
    case = golden("gpt_oss")
    del case.config["rope_parameters"], case.config["swiglu_limit"]
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    case.config |= {
        "rope_scaling": {**yarn, "rope_type": "yarn", "truncate": False},
        "rope_theta": 150000,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        "experts_per_token": 4,
        "initial_context_length": 4096,
        "swiglu_limit": 7.0,
    }
    config = read_config(case.write(tmp_path))
    assert (config.rope_theta, config.rope_scaling.truncate, config.swiglu_limit) == (150000.0, False, 7.0)
    assert config.rope_scaling.attention_factor == pytest.approx(0.1 * np.log(32) + 1)
    assert config.sliding_layers == (0,)
