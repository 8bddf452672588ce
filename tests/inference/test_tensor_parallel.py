"""Kernels inside a program that is split over four chips."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from twla_jax.core.tensors import TernaryTensor
from twla_jax.inference import tensor_parallel
from twla_jax.ops.ternary_matmul import kernel_weight, ternary_matmul


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
