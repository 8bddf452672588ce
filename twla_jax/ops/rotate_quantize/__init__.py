"""Prepares the input of a quantised linear in one pass: optional RMS norm, Kronecker rotation and per-token codes."""

from twla_jax.ops.rotate_quantize.api import rotate_quantize
from twla_jax.ops.rotate_quantize.reference import gate, rms_norm
from twla_jax.ops.rotate_quantize.rotation import KernelRotation, kernel_rotation
from twla_jax.ops.tokens import quantizer_settings

__all__ = ["KernelRotation", "gate", "kernel_rotation", "quantizer_settings", "rms_norm", "rotate_quantize"]
