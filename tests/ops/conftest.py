"""Compiles programs for chips that are not there."""

import importlib.util
import os
import re

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}

# What the compiler must know of a device: the published figures of an H100 SXM and of compute capability 9.0.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  memory_bandwidth: 3352000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def pytest_runtest_setup(item):
    """Skip before a test has built what it would compile."""
    if item.get_closest_marker("aot") and not any(map(_installed, ("libtpu", "jax_plugins.xla_cuda13"))):
        pytest.skip("no compilers are installed: pip install '.[aot]'")


@pytest.fixture
def compile_for():
    """Return `compile_for(target, function, *arguments)`, which compiles for a key of `TPUS` or for `h100`."""
    return _compile_for


@pytest.fixture
def two_h100():
    """Return a mesh of two H100, over which a model is split."""
    if not _installed("jax_plugins.xla_cuda13"):
        pytest.skip("jax_plugins.xla_cuda13 is not installed: pip install '.[aot]'")
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x2")
    return topologies.make_mesh(topology, (1, 2), ("data", "model"))


@pytest.fixture
def compile_for_h100(monkeypatch, capfd, request):
    """Return a function that compiles for an H100; it returns the program, and ptxas's line on each kernel's spills.

    If TWLA_AOT_REPORT names a file, the lines on registers and spills are appended to it, under the test's name.
    """

    def compile_and_read(function, *arguments):
        monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
        compiled = _compile_for("h100", function, *arguments)
        text = capfd.readouterr().out
        reports = re.findall(r"\d+ bytes stack frame.*", text)
        if path := os.environ.get("TWLA_AOT_REPORT"):
            used = re.findall(r"Used \d+ registers", text)
            with open(path, "a") as file:
                file.write(f"{request.node.name}: {'; '.join(used + reports)}\n")
        return compiled, reports

    return compile_and_read


def _compile_for(target: str, function, *arguments):
    module = "jax_plugins.xla_cuda13" if target == "h100" else "libtpu"
    if not _installed(module):
        pytest.skip(f"{module} is not installed: pip install '.[aot]'")
    if target == "h100":
        topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    else:
        topology = topologies.get_topology_desc(TPUS[target], platform="tpu")
    sharding = SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
    )
    mesh = topologies.make_mesh(topology, (len(topology.devices),), ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*arguments).compile()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
