"""Kernels inside a program that is split over several devices, and what a decode step sends between these."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from twla_jax.bench import shapes
from twla_jax.core.tensors import TernaryTensor, dequantize
from twla_jax.inference import generation, tensor_parallel
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.inference.sampling import Sampling
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import computing_in
from twla_jax.models.sharding import make_mesh
from twla_jax.ops.ternary_matmul import kernel_weight, ternary_matmul

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=256,
    num_layers=1,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    tie_word_embeddings=False,
)
ROOM = 64


def loop(model):
    """The operands of a few greedy decode steps on the device."""
    cache = dataclasses.replace(model.init_cache(1, ROOM), length=jnp.int32(0))
    token, count, ends = jnp.zeros(1, jnp.int32), jnp.int32(12), np.zeros(0, np.int32)
    return model, token, cache, count, Sampling().sampler(), jax.random.key(0), ends


def decoder(mesh):
    """A model with a packed embedding and head, in a type in which sums differ little with XLA's fusions."""
    model = shapes.random_model(CONFIG, activation_bits=8, embedding_bits=4)
    return prepare_for_inference(computing_in(model, jnp.float32), mesh=mesh, unpack=False)


@pytest.fixture(scope="module")
def packed():
    return decoder(make_mesh("model=2"))


@pytest.fixture(scope="module")
def program(packed):
    return generation.steps.lower(*loop(packed), room=ROOM).compile()


@pytest.mark.hlo
def test_a_decode_step_gathers_four_small_arrays_a_layer(program):
    """No weights, no cache, no logits: beside the four, a row of the embedding and the likeliest tokens."""
    sent = re.findall(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
        program.as_text(),
    )
    sizes = [
        (name, math.prod(map(int, filter(None, dims.split(",")))))
        for shape, name in sent
        for dims in re.findall(r"\[([\d,]*)\]", shape)
    ]
    d = CONFIG.hidden_size
    layer = [("all-gather", each) for each in (CONFIG.num_heads * CONFIG.head_dim, d, 256, d)]
    large = [each for each in sizes if each[1] > 2]
    assert sorted(large) == sorted([("all-reduce", d)] + CONFIG.num_layers * layer)
    # Value and token of each device's likeliest.
    assert [name for name, size in sizes if size <= 2] == 2 * ["all-gather"]


def test_the_cache_stays_in_place_and_split_by_heads(program, packed):
    cache = packed.init_cache(1, ROOM)
    _, _, after = program.output_shardings
    for before, layer in zip(cache.layers, after.layers, strict=True):
        assert before.entries.sharding.spec[2] == "model"
        assert layer.entries.is_equivalent_to(before.entries.sharding, before.entries.ndim)
    entries = sum(layer.entries.nbytes for layer in cache.layers) / 2
    assert program.memory_analysis().alias_size_in_bytes >= entries


def test_tokens_and_cache_are_those_of_one_device(program, packed):
    expected, _, before = generation.steps(*loop(decoder(None)), room=ROOM)
    found, made, cache = program(*loop(packed))
    assert made == 12
    np.testing.assert_array_equal(found, expected)
    for layer, one in zip(cache.layers, before.layers, strict=True):
        assert one.entries[:, 0, :, :11].all()
        np.testing.assert_allclose(layer.entries, one.entries, atol=1e-3)


@pytest.mark.parametrize("vocab", [96, 95])
def test_a_row_of_a_split_embedding_is_looked_up_where_it_is(vocab):
    mesh, tokens = make_mesh("data=2,model=4"), jnp.asarray([[0, 23], [24, 94]])
    integers = shapes.integer_tensor(jax.random.key(0), vocab, 128, 4, 1.0)
    dense = np.asarray(dequantize(integers, jnp.float32))
    split = PartitionSpec("model" if vocab % 4 == 0 else None)
    table = jax.device_put(dense, NamedSharding(mesh, split))
    for each in (table, tensor_parallel.sharded_table(integers, mesh)):
        found = jax.jit(functools.partial(tensor_parallel.rows, dtype=jnp.float32, mesh=mesh))(each, tokens)
        np.testing.assert_array_equal(found, dense[np.asarray(tokens)])


@pytest.mark.hlo
@pytest.mark.aot
def test_a_split_linear_is_a_kernel_on_each_chip_and_its_output_stays_there():
    pytest.importorskip("libtpu")
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    mesh = topologies.make_mesh(topology, (1, 4), ("data", "model"))

    def shape(*size, dtype, spec=()):
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    rows, m = 1024, 4096
    scales = jax.ShapeDtypeStruct((rows, m // 128), jnp.float16)
    share = TernaryTensor(
        codes=jax.ShapeDtypeStruct((rows, m // 4), jnp.uint8),
        alpha=scales,
        mu=scales,
        in_features=m,
        group_size=128,
    )
    weight = jax.tree.map(
        lambda leaf: shape(4, *leaf.shape, dtype=leaf.dtype, spec=("model",)),
        jax.eval_shape(lambda weight: kernel_weight([weight]), share),
    )
    linear = functools.partial(tensor_parallel.matmul, ternary_matmul, mesh=mesh)
    compiled = jax.jit(linear).lower(shape(1, 1, m, dtype=jnp.bfloat16), weight=weight).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    assert not any(collective in text for collective in ("all-reduce", "all-gather", "all-to-all"))
    assert compiled.output_shardings.is_equivalent_to(
        NamedSharding(mesh, PartitionSpec(None, None, "model")), 3
    )
