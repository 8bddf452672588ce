"""The input of a quantised linear: optional RMS norm, Kronecker rotation and per-token codes in one pass."""

from twla_jax.ops.rotate_quantize.api import rotate_quantize
from twla_jax.ops.rotate_quantize.rotation import KernelRotation, kernel_rotation

__all__ = ["KernelRotation", "kernel_rotation", "rotate_quantize"]
