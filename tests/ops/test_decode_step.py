"""A decode step, its blocks and its ops, compiled for chips that are not there."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from twla_jax.bench import SHAPES, shapes
from twla_jax.inference import generation, tensor_parallel
from twla_jax.inference.packed_block import PackedLlamaBlock
from twla_jax.inference.sampling import Sampling
from twla_jax.models import sharding
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention.kv_cache import empty_layer
from twla_jax.ops.attention.reference import Positions, attention
from twla_jax.ops.rotate_quantize import quantizer_settings, rotate_quantize
from twla_jax.ops.ternary_matmul import ternary_matmul
from twla_jax.serving import loops, slots
from twla_jax.serving.rows import row, together

GREEDY = Sampling().sampler()


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "batch", "bits", "cache_dtype", "embedding_bits", "tied"),
    [
        ("h100", 1, 8, None, 16, False),
        ("h100", 3, 8, jnp.int8, 16, True),
        ("h100", 1, None, None, 16, False),
        ("h100", 1, 8, None, 4, True),
        ("h100", 1, 8, None, 4, False),
        ("v5e", 1, 8, None, 16, True),
        ("v5e", 3, 8, None, 8, True),
        ("v5e", 3, 8, None, 8, False),
        ("v5e", 3, 8, jnp.int8, 8, True),
        ("v5e", 1, 8, None, 4, False),
    ],
)
@pytest.mark.hlo
def test_a_step_copies_neither_cache_nor_weights(
    target, batch, bits, cache_dtype, embedding_bits, tied, compile_for
):
    model = decoder(bits, embedding_bits, tied)
    cache = model.init_cache(batch, 5120, cache_dtype)
    compiled = compile_for(target, loop, model, jnp.zeros(batch, jnp.int32), cache, jax.random.key(0))
    assert compiled.memory_analysis().temp_size_in_bytes < 8e6
    if target == "h100":  # XLA would fuse a kernel with the slices that it reads.
        assert not re.search(r"%dynamic_slice_fusion\S* = ", compiled.as_text())


@pytest.mark.hlo
@pytest.mark.aot
@pytest.mark.parametrize("packed", [False, True])
def test_a_token_on_two_gpus_brings_its_row_of_the_embedding_and_no_other(packed, two_h100):
    model = nnx.eval_shape(lambda: Decoder(SHAPES["tiny"], rngs=nnx.Rngs(0)))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32, sharding=NamedSharding(two_h100, PartitionSpec()))

    def rows(model, token):
        if packed:
            return tensor_parallel.rows(model.embed.get_value(), token, model.dtype, two_h100)
        return model.embed_tokens(token)

    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        model,
        sharding.shardings(model, two_h100),
    )
    whole = NamedSharding(two_h100, PartitionSpec())
    program = jax.jit(rows, out_shardings=whole).lower(placed, token).compile().as_text()
    sent = re.findall(r"f32\[(\S*),512\]\S* (all-gather|all-reduce|reduce-scatter)", program)
    assert sent
    assert {name for _, name in sent} == {"all-reduce"}


@pytest.mark.hlo
@pytest.mark.aot
def test_a_linear_on_a_gpu_reads_attention_in_parts(compile_for, monkeypatch):
    monkeypatch.setattr(PackedLlamaBlock, "takes_splits", True)  # it would look for a GPU
    model = decoder(8, 16, tied=True)
    arguments = model, jnp.zeros(1, jnp.int32), model.init_cache(1, 640), GREEDY, jax.random.key(0)
    program = compile_for("h100", generation.step.__wrapped__, *arguments).as_text()
    softmax = re.escape(f",{model.config.num_heads},2]")
    kernels = re.findall(rf"= \(bf16\[1,(\d),\S*, f32\[1,\d{softmax}\S*.*\) custom-call", program)
    assert kernels == ["2"] * model.config.num_layers
    assert not re.search(r"exponential", program)


@pytest.mark.hlo
@pytest.mark.aot
@pytest.mark.parametrize(("width", "kernels"), [(1024, 4), (2048, 3)])
def test_a_step_on_a_gpu_is_a_few_kernels_a_layer_in_place(width, kernels, compile_for, monkeypatch):
    monkeypatch.setattr(PackedLlamaBlock, "takes_splits", True)
    model = decoder(8, 4, tied=False, hidden_size=width, num_heads=16)
    cache = model.init_cache(1, 640)
    arguments = model, jnp.zeros(1, jnp.int32), cache, jax.random.key(0)
    program = compile_for("h100", loop, *arguments).as_text()
    within = program[: program.index("ENTRY")]
    of_head = 1
    assert within.count('custom_call_target="mosaic') == kernels * model.config.num_layers + of_head
    assert not re.search(r"= (bf16\[2,1,8,640,64\]|s32\[1,\d+\])\S* copy", within)


@pytest.mark.hlo
@pytest.mark.aot
@pytest.mark.parametrize(
    ("rows", "kernels", "fixed"), [(1, 4, {"filtered": False}), (8, 9, None), (8, 9, {"filtered": True})]
)
def test_a_step_of_some_slots_works_in_the_cache_of_all(rows, kernels, fixed, compile_for, monkeypatch):
    monkeypatch.setattr(PackedLlamaBlock, "takes_splits", rows == 1)
    model = decoder(8, 4, tied=False, hidden_size=1024, num_heads=16)
    state = slots.empty_slots(model, 8, 640)

    def steps(model, state, keep):
        if fixed:
            return loops.fixed_steps(model, state, keep, rows=rows, count=4, **fixed)
        return loops.steps(model, state, keep, jnp.int32(3), rows=rows, room=4)

    program = compile_for("h100", steps, model, state, jnp.ones(8, bool)).as_text()
    within = program[: program.index("ENTRY")]
    assert within.count('custom_call_target="mosaic') == kernels * model.config.num_layers + 1
    assert not re.search(r"= bf16\[2,\d,8,640,64\]\S* (copy|slice|fusion)", within)
    assert not re.search(r"= s32\[1,\d{4,}\]\S* copy", within)
    if fixed:  # The host waits neither for the end of the loop nor for a branch.
        (loop,) = re.findall(r" while\(.*", program)
        assert '"known_trip_count":{"n":"4"}' in loop
        assert " conditional(" not in program


@pytest.mark.hlo
@pytest.mark.aot
def test_several_prompts_go_into_the_cache_of_all_in_place(compile_for, monkeypatch):
    monkeypatch.setattr(PackedLlamaBlock, "takes_splits", False)
    model = decoder(8, 4, tied=False, hidden_size=1024, num_heads=16, vocab_size=512, num_layers=1)
    state = slots.empty_slots(model, 16, 640)
    nothing = row(Sampling(), limit=1, ends=(), told=False, config=model.config)
    arguments = jnp.zeros((8, 64), jnp.int32), jnp.ones(8, jnp.int32), together([nothing] * 8), jnp.arange(8)

    def twice(model, state, *arguments):
        return slots.read(model, slots.read(model, state, *arguments)[1], *arguments)

    program = compile_for("h100", twice, model, state, *arguments).as_text()
    assert " while(" not in program
    assert " conditional(" not in program
    # Of the caches that come in, which nobody gives away here.
    copies = re.findall(r"= bf16\[2,16,8,640,64\]\S* copy", program)
    assert len(copies) == model.config.num_layers


@pytest.mark.hlo
@pytest.mark.aot
def test_a_step_on_tpus_takes_scales_as_they_are(compile_for, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # the backend on which the model is prepared
    model = decoder.__wrapped__(8, 8, tied=False)
    cache = model.init_cache(1, 640)
    arguments = model, jnp.zeros(1, jnp.int32), cache, GREEDY, jax.random.key(0)
    program = compile_for("v5e", generation.step.__wrapped__, *arguments).as_text()
    assert not re.search(r"= s16\S* bitcast-convert", program)


@pytest.mark.aot
def test_an_int8_cache_is_widened_nowhere_but_on_its_way(compile_for):
    def attend(q, layer, positions):
        return attention(q, layer, positions, jnp.int32(1 << 30))

    layer = jax.eval_shape(lambda: empty_layer((2, 8, 8, 4096, 128), jnp.int8))
    q, angles = jnp.zeros((8, 1, 32, 128), jnp.bfloat16), jnp.zeros((1, 64))
    positions = Positions(query=jnp.zeros(1, jnp.int32), key=jnp.arange(4096), cos=angles, sin=angles)
    assert compile_for("v6e", attend, q, layer, positions).memory_analysis().temp_size_in_bytes < 1e6


@pytest.mark.hlo
@pytest.mark.aot
@pytest.mark.parametrize("m", [4096, 5120])
def test_nothing_stands_between_the_two_kernels_of_a_linear(m, compile_for):
    def linear(x, rotation, weight, scale):
        tokens = rotate_quantize(x, rotation, quantizer_settings(4, 0.9), norm_scale=scale, epsilon=1e-5)
        return ternary_matmul(tokens, weight)

    rotation, weight = linear_shapes(1024, m)
    x, scale = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 1, m), (m,)))
    assert work(compile_for("h100", linear, x, rotation, weight, scale)) == ["custom-call"] * 2


@pytest.mark.hlo
@pytest.mark.aot
def test_a_gate_of_many_tokens_is_read_as_it_lies(compile_for):
    def quantized(x, rotation):
        return rotate_quantize(x, rotation, quantizer_settings(4, 0.9), gated=True)

    rotation, _ = linear_shapes(4096, 11008)
    x = jax.ShapeDtypeStruct((1, 64, 2 * 11008), jnp.bfloat16)
    # Only the kernel, which adds up its codes itself.
    assert work(compile_for("h100", quantized, x, rotation)) == ["custom-call", "tuple"]


def loop(model, token, cache, key):
    ends = np.zeros(0, np.int32)
    return generation.steps(model, token, cache, jnp.int32(9), GREEDY, key, ends, room=64)


@functools.cache
def decoder(bits, embedding_bits, tied, **more):
    # A head of 65 MB, and 21 MB of keys and values, which another layout or dtype would copy.
    config = dataclasses.replace(SHAPES["tiny"], vocab_size=64000, num_kv_heads=8)
    config = dataclasses.replace(config, tie_word_embeddings=tied, **more)
    return shapes.random_decoder(config, activation_bits=bits, embedding_bits=embedding_bits)


def linear_shapes(n, m):
    key = jax.random.key(0)
    return jax.eval_shape(lambda: (shapes.rotation_for_kernels(key, m, n), shapes.weight(key, n, m)))


def work(compiled):
    program = compiled.as_text()
    operations = re.findall(r"^ .*? = .*? ([\w-]+)\(", program[program.index("ENTRY") :], re.MULTILINE)
    return [
        name for name in operations if name not in ("parameter", "constant", "bitcast", "get-tuple-element")
    ]
