"""GGUF files: every tensor type, the order of query and key rows, whole or damaged."""

import copy
import os
import struct

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from twla_jax.errors import TwlaError
from twla_jax.models.families import FAMILIES, by_gguf_architecture, config_from_hf
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.models.io.readers import load_model, read_config, read_model
from twla_jax.models.rope_settings import RopeScaling

forward = jax.jit(lambda model, tokens: model(tokens))
# Published name → name in a GGUF file.
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    **{f"mlp.experts.{name}_proj": f"ffn_{name}_exps" for name in ("gate", "up", "down")},
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NAMES |= {f"model.layers.{i}.{k}": f"blk.{i}.{v}" for i in range(2) for k, v in BLOCK_NAMES.items()}
GEMMA_NAMES = {
    f"model.layers.{i}.{name}": f"blk.{i}.{stored}"
    for i in range(2)
    for name, stored in (
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    )
}


def interleave(weight, heads):
    """The order llama.cpp wants for rotations of neighbouring pairs: first and second halves of a head alternate."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def write(case, path, architecture, *, kind=Kind.F16, extra=None, metadata=None, drop=()):
    """A golden as a GGUF file; matrices in `kind` where their rows divide into its blocks, else F16."""
    config = case.config
    writer = gguf.GGUFWriter(path, architecture)
    stated = {key for _, key, _ in metadata or ()}
    for key, value in (
        ("context_length", config["max_position_embeddings"]),
        ("embedding_length", config["hidden_size"]),
        ("block_count", config["num_hidden_layers"]),
        ("feed_forward_length", config["intermediate_size"]),
        ("attention.head_count", config["num_attention_heads"]),
    ):
        if f"{architecture}.{key}" not in stated:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    for add, key, value in metadata or ():
        getattr(writer, add)(key, value)
    tensors = {}
    for name, weight in case.weights.items():
        stem, leaf = name.rsplit(".", 1)
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if architecture == "llama" and stem.endswith(projection):
                weight = interleave(weight, config[heads])
        if architecture == "gemma3" and stem.endswith("norm"):
            weight = 1 + weight.astype(np.float32)  # llama.cpp's converter stores the scales themselves
        names = {**NAMES, **GEMMA_NAMES} if architecture == "gemma3" else NAMES
        tensors[f"{names[stem]}.{leaf}"] = weight
    for name, weight in {**tensors, **(extra or {})}.items():
        if name in drop:
            continue
        if weight.ndim == 1:
            writer.add_tensor(name, weight.astype(np.float32))
        elif kind == Kind.F16 or weight.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(name, weight.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quantize(weight.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path, read=load_model):
    with pytest.raises(TwlaError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "llama"),
        ("mistral", "llama"),
        ("qwen2_tied", "qwen2"),
        ("qwen3", "qwen3"),
        ("qwen3_tied", "qwen3"),
    ],
)
def test_a_family_in_gguf_gives_the_logits_of_the_pytorch_model(name, architecture, golden, tmp_path):
    case = golden(name)
    model = load_model(write(case, tmp_path / "model.gguf", architecture))
    case.assert_logits(forward(model, case.tokens))
    assert model.blocks.q.kernel.get_value().dtype == np.float16
    assert model.norm.scale.get_value().dtype == np.float32


def test_experts_in_gguf_are_stacked_tensors(golden, tmp_path):
    case = golden("qwen3_moe")
    for layer in range(2):
        for name in ("gate", "up", "down"):
            stem = f"model.layers.{layer}.mlp.experts"
            each = [case.weights.pop(f"{stem}.{expert}.{name}_proj.weight") for expert in range(8)]
            case.weights[f"{stem}.{name}_proj.weight"] = np.stack(each)
    metadata = [
        ("add_uint32", f"qwen3moe.{key}", value)
        for key, value in (("expert_count", 8), ("expert_used_count", 3), ("expert_feed_forward_length", 24))
    ]
    model = load_model(write(case, tmp_path / "model.gguf", "qwen3moe", metadata=metadata))
    case.assert_logits(forward(model, case.tokens))
    file = write(case, tmp_path / "model.gguf", "qwen3moe", metadata=metadata[1:])
    assert "num_experts is null" in refusal(file, read_config)


def test_gemma_3_in_gguf_is_the_model_in_safetensors(golden, tmp_path):
    case = golden("gemma3")
    # By llama.cpp's rule, every sixth layer is full, and scores are scaled by the head's size.
    case.config |= {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 16}
    window = ("add_uint32", "gemma3.attention.sliding_window", case.config["sliding_window"])
    base = ("add_float32", "gemma3.rope.freq_base", 1e6)
    one = load_model(case.write(tmp_path))
    path = write(case, tmp_path / "model.gguf", "gemma3", metadata=[window, base])
    other = load_model(path)
    assert read_config(path).sliding_layers == one.config.sliding_layers == (0, 1)
    expected = np.asarray(forward(one, case.tokens))
    np.testing.assert_allclose(
        np.asarray(forward(other, case.tokens)), expected, atol=1e-5 * np.abs(expected).max()
    )


def test_rope_scaling_comes_as_a_factor_or_as_a_tensor_of_factors(golden, tmp_path):
    case = golden("llama_linear_biases")
    scaling = [
        ("add_string", "llama.rope.scaling.type", "linear"),
        ("add_float32", "llama.rope.scaling.factor", 4.0),
    ]
    model = load_model(write(case, tmp_path / "linear.gguf", "llama", metadata=scaling))
    case.assert_logits(forward(model, case.tokens))

    case = golden("llama_tied_llama3")
    # 4 frequencies, wavelengths 2π·10^i, against 64 positions: kept, blended, divided by 8, divided by 8.
    blend = (64 / (2 * np.pi * 10) - 1) / (4 - 1)
    factors = np.array([1, 1 / ((1 - blend) / 8 + blend), 8, 8], np.float32)
    path = write(case, tmp_path / "factors.gguf", "llama", extra={"rope_freqs.weight": factors})
    model = load_model(path)
    assert model.config.rope_scaling.kind == "factors"
    case.assert_logits(forward(model, case.tokens))


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.BF16])
def test_quantised_matrices_are_read_as_what_they_stand_for(kind, golden, tmp_path):
    case = golden("llama")
    model = load_model(write(case, tmp_path / "model.gguf", "llama", kind=kind))
    for parameter, name in (("q", "self_attn.q_proj"), ("gate", "mlp.gate_proj")):
        weight = case.weights[f"model.layers.1.{name}.weight"].astype(np.float32)
        expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
        np.testing.assert_array_equal(getattr(model.blocks, parameter).kernel.get_value()[1], expected.T)
    assert model.blocks.q.kernel.get_value().dtype == ("bfloat16" if kind == Kind.BF16 else np.float32)
    if kind != Kind.BF16:  # the down matrix has rows of 48, which no block of 32 divides
        assert model.blocks.down.kernel.get_value().dtype == np.float16


def test_a_model_that_computes_in_half_precision_keeps_quantised_matrices_in_it(golden, tmp_path):
    path = write(golden("llama"), tmp_path / "model.gguf", "llama", kind=Kind.Q8_0)
    assert load_model(path, dtype=np.float16).blocks.q.kernel.get_value().dtype == np.float16


@pytest.mark.parametrize(
    "kind",
    [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q5_0, Kind.Q5_1, Kind.IQ4_XS, Kind.F32],
)
def test_any_bytes_are_read_as_the_gguf_package_reads_them(kind, tmp_path):
    rng = np.random.default_rng(0)
    # No byte above 0x3f, so that no half-precision scale is infinite.
    rows = rng.integers(0, 0x40, (3, gguf.quant_shape_to_byte_shape((1, 512), kind)[1]), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_array("some.names", ["a", "bc", "é"])
    writer.add_array("some.numbers", [[1, 2], [3]])
    writer.add_tensor("tensor", rows if kind != Kind.F32 else rows.view(np.float32), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, published = GgufFile(tmp_path / "one.gguf"), gguf.GGUFReader(tmp_path / "one.gguf")
    assert file.metadata["some.names"] == ["a", "bc", "é"]
    assert file.metadata["some.numbers"] == [[1, 2], [3]]
    assert file.tensors["tensor"].shape == (3, 512)
    np.testing.assert_array_equal(file.read("tensor"), gguf.dequantize(published.tensors[0].data, kind))


def test_a_file_cut_anywhere_is_refused(golden, tmp_path):
    whole = write(golden("qwen2_tied"), tmp_path / "whole.gguf", "qwen2").read_bytes()
    cut = tmp_path / "cut.gguf"
    for keep in (*range(5, 2000, 97), 2500, len(whole) // 2, len(whole) - 64):
        cut.write_bytes(whole[:keep])
        assert refusal(cut).startswith("cut short")
    assert refusal(cut) == "cut short, tensor 'output_norm.weight' is not whole"
    for content in (b"", b"GG", b"PK\x03\x04" + bytes(100)):
        cut.write_bytes(content)
        assert refusal(cut) == "not a GGUF file"
    cut.write_bytes(b"GGUF\x09\x00\x00\x00" + bytes(16))
    assert "version 9" in refusal(cut)


def test_unusable_tensors_are_named(golden, tmp_path):
    case = golden("qwen2_tied")
    name, path = "model.layers.1.mlp.up_proj.weight", tmp_path / "model.gguf"
    original = case.weights[name]
    broken = original.copy()
    broken[0, 0] = np.inf
    for value, message in (
        (broken, "tensor 'blk.1.ffn_up.weight' has 1 NaN or infinite values"),
        (original[:31], "tensor 'blk.1.ffn_up.weight' has shape [31, 32], not [48, 32]"),
    ):
        case.weights[name] = value
        assert refusal(write(case, path, "qwen2")) == message
    case.weights[name] = original
    assert "'blk.0.attn_v.bias' is missing" in refusal(write(case, path, "qwen2", drop=["blk.0.attn_v.bias"]))
    extra = {"blk.0.ffn_gate_exps.weight": original}
    assert "'blk.0.ffn_gate_exps.weight' has no place" in refusal(write(case, path, "qwen2", extra=extra))


def test_what_is_not_supported_is_refused_from_the_metadata(golden, tmp_path):
    case, path = golden("qwen2_tied"), tmp_path / "model.gguf"
    write(case, path, "mamba")
    for read in (load_model, read_config, read_model):
        message = refusal(path, read)
        assert message.startswith(
            "architecture 'mamba' is not supported; supported are llama, qwen2, qwen3, "
        )
    for entry, message in (
        (("add_uint32", "llama.expert_count", 8), "experts_per_token is null"),
        (("add_string", "llama.rope.scaling.type", "longrope"), "rope scaling 'longrope' is not supported"),
        (("add_float32", "llama.logit_scale", 2.0), "llama.logit_scale 2.0 is not supported"),
        (("add_uint32", "llama.attention.value_length", 4), "keys and values of different sizes"),
        (("add_array", "llama.attention.head_count", [4, 2]), "differs between layers"),
        (("add_string", "llama.context_length", "64"), "llama.context_length is '64', not an integer"),
        (("add_uint32", "llama.attention.head_count", 0), "llama.attention.head_count is 0, not an integer"),
        (("add_uint32", "llama.block_count", 10**9), "llama.block_count is 1000000000, not an integer"),
        (("add_float32", "llama.rope.freq_base", 0.0), "llama.rope.freq_base is 0.0, not a number above 0"),
        (("add_uint32", "general.alignment", 0), "general.alignment is 0, not 1 or 2"),
        (("add_string", "general.alignment", "32"), "general.alignment is '32', not 1 or 2"),
        (("add_string", "split.count", "3"), "split.count is '3', not an integer"),
        (("add_uint32", "llama.rope.dimension_count", 4), "rotary positions on a part of the head"),
        (("add_uint16", "split.count", 3), "is one of 3 parts"),
        (("add_float32", "llama.rope.scaling.attn_factor", 2.0), "attn_factor 2 is only supported for yarn"),
    ):
        assert message in refusal(write(golden("llama"), path, "llama", metadata=[entry]), read_config)
    write(case, path, "qwen2", metadata=[("add_uint32", "qwen2.expert_count", 8)])
    assert "qwen2 with 8 experts is not supported" in refusal(path, read_config)
    assert "metadata 'tokenizer.ggml.tokens' is missing" in refusal(
        write(golden("llama"), path, "llama"), read_model
    )


def test_special_tokens_without_a_row_are_none(golden, tmp_path):
    ids = {"eos": 2**32 - 1, "eot": 5, "bos": 2**32 - 1}
    entries = [("add_uint32", f"tokenizer.ggml.{key}_token_id", value) for key, value in ids.items()]
    config = read_config(write(golden("llama"), tmp_path / "model.gguf", "llama", metadata=entries))
    assert (config.eos_token_ids, config.bos_token_id) == ((5,), None)


def test_scalings_have_the_names_and_defaults_of_llama_cpp(golden, tmp_path):
    def scaling(*entries):
        path = write(golden("llama"), tmp_path / "model.gguf", "llama", metadata=entries)
        return read_config(path).rope_scaling

    assert scaling(("add_float32", "llama.rope.scale_linear", 4.0)) == RopeScaling(kind="linear", factor=4.0)
    assert scaling(("add_float32", "llama.rope.scaling.factor", 4.0)) == RopeScaling(
        kind="linear", factor=4.0
    )
    assert scaling(("add_float32", "llama.rope.scale_linear", 0.0)) is None
    none = ("add_string", "llama.rope.scaling.type", "none")
    assert scaling(none, ("add_float32", "llama.rope.scaling.factor", 4.0)) is None
    yarn = scaling(
        ("add_string", "llama.rope.scaling.type", "yarn"),
        ("add_float32", "llama.rope.scaling.factor", 4.0),
        ("add_uint32", "llama.rope.scaling.original_context_length", 16),
    )
    stated = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert yarn == config_from_hf({**golden("llama").config, "rope_parameters": stated}).rope_scaling


def test_a_model_split_over_files_is_read_from_any_of_them(golden, tmp_path):
    case = golden("qwen2_tied")
    names, expected = sorted(case.weights), load_model(write(case, tmp_path / "whole.gguf", "qwen2"))

    def part(number, count=2, says=2, **more):
        held = case.weights if count == 1 else {name: case.weights[name] for name in names[number::count]}
        part_of = copy.copy(case)
        part_of.weights = held | more
        entries = [
            ("add_uint16", "split.no", number),
            ("add_uint16", "split.count", says),
            ("add_int32", "split.tensors.count", len(names)),
        ]
        path = tmp_path / f"model-{number + 1:05d}-of-00002.gguf"
        return write(part_of, path, "qwen2", metadata=entries)

    paths = [part(0), part(1)]
    for path in paths:
        model = load_model(path)
        assert model.config == expected.config
        for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)
    part(1, **{names[0]: case.weights[names[0]]})
    assert "is in another part, too" in refusal(paths[1])
    part(1, says=3)
    with pytest.raises(TwlaError, match="does not say that it is part 2 of 2"):
        load_model(paths[0])
    paths[1].unlink()
    with pytest.raises(TwlaError, match=r"model-00002-of-00002\.gguf: cannot be read \(No such file"):
        load_model(paths[0])


def test_headers_are_bounded_before_anything_is_allocated(tmp_path):
    path = tmp_path / "x.gguf"

    def header(tensors, entries, body=b""):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + body)
        return refusal(path)

    def key(name, kind, value):
        return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value

    assert header(2**62, 2**62).startswith("cut short")
    assert header(0, 1, key(b"a", 9, struct.pack("<IQ", 0, 2**60))).startswith("cut short")
    assert header(0, 1, key(b"a", 8, struct.pack("<Q", 2**60))).startswith("cut short")
    nested = key(b"a", 9, struct.pack("<IQ", 9, 1) * 5000)
    assert "arrays are nested too deeply" in header(0, 1, nested)
    assert "'a' is there twice" in header(0, 2, key(b"a", 0, b"\1") * 2)
    tensor = struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**32 - 1)
    assert "tensor 't' has 4294967295 axes" in header(1, 0, tensor)
    path.unlink()
    os.mkfifo(path)
    assert refusal(path) == "not a regular file"


def test_the_two_key_maps_name_the_same_parameters():
    named = [family for family in FAMILIES.values() if family.gguf_architecture]
    assert len(named) > len(by_gguf_architecture())  # Llama and Mixtral have one name
    for family in named:
        assert family.gguf_tensors.keys() == family.hf_tensors.keys()
