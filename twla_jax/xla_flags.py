"""What XLA has to be told before JAX first uses a device."""

import os

_TRITON = "xla_gpu_enable_triton_gemm"


def take_products_from_libraries() -> None:
    """Has XLA take a GPU's matrix products from NVIDIA's libraries, unless `XLA_FLAGS` already says what to do.

    XLA would spend minutes on timing its own, each time anew, and they may be wrong. With JAX 0.11.2 on an H100 the
    reference of a rotated linear of 11008 columns was, where a CPU and the kernel agree; compiled ahead of time, its
    rotation is cut in four of 24 of 86 columns.
    """
    if not says_where_products_are_from():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_TRITON}=false".strip()


def says_where_products_are_from() -> bool:
    """Whether `XLA_FLAGS` does."""
    return _TRITON in os.environ.get("XLA_FLAGS", "")
