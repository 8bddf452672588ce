"""Sets flags that XLA needs before JAX first uses a device."""

import os

_TRITON = "xla_gpu_enable_triton_gemm"


def disable_triton_gemm() -> None:
    """Make XLA take a GPU's matrix products from NVIDIA's libraries, unless `XLA_FLAGS` already decides that.

    XLA spends minutes timing its own Triton products, in every process, and some are wrong. With JAX 0.11.2 on an H100
    the reference of a rotated linear with 11008 columns was wrong, where a CPU and the kernel agree: its rotation was
    cut into four pieces of 24 of the 86 columns.
    """
    if not triton_gemm_is_set():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_TRITON}=false".strip()


def triton_gemm_is_set() -> bool:
    """Return whether `XLA_FLAGS` says if XLA may use its own Triton products."""
    return _TRITON in os.environ.get("XLA_FLAGS", "")
