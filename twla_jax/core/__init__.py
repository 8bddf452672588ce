"""Holds the method below the whole model: arrays in, arrays out, every function usable under `jax.jit`.

One matrix, from calibration inputs `x [t, m]` and weights `w [n, m]`, rows being outputs:

    moment = core.accumulate_moment(jnp.zeros((m, m)), x)
    rotation, _ = core.fit_rotation(w, jax.random.key(0))
    tensor, errors = core.quantize_matrix(rotation(w), core.rotate_moment(moment, rotation), len(x))
    y = core.packed_matmul(rotation(x), tensor)  # [t, n], close to x @ w.T

Settings are frozen and hashable: under `jax.jit` they are static. Nothing here knows Flax, files or models.
"""

from twla_jax.core.activation import (
    BIT_CHOICES,
    ActivationQuantizer,
    fake_quantize,
    fit_clips,
    quantize_tokens,
    with_bits,
)
from twla_jax.core.e2m_atq import euclidean_fit, nearest_codes, relocate
from twla_jax.core.factors import factor
from twla_jax.core.gptq import accumulate_moment, propagated, quantize_matrix, sweep_codes
from twla_jax.core.grouped import quantize_in_groups
from twla_jax.core.grouped_tensor import GroupedTensor
from twla_jax.core.ila_amp import SensitivityTable, allocate, average_bits
from twla_jax.core.kotms import KroneckerRotation, factor_sizes, fit_rotation, rotate_moment, tri_modal_loss
from twla_jax.core.packing import pack, unpack
from twla_jax.core.quantizers import Integers, OnePlane, Quantizer, TwoPlanes, quantizer
from twla_jax.core.settings import (
    ActivationSettings,
    CompensationSettings,
    GroupedSettings,
    IntegerSettings,
    QuantizationSettings,
    RotationSettings,
    SymmetricSettings,
    TernarySettings,
    TwoPlaneSettings,
    WeightSettings,
)
from twla_jax.core.stiefel import random_orthogonal, riemannian
from twla_jax.core.tensors import IntegerTensor, TernaryTensor, dequantize, from_codes, packed_matmul

__all__ = [
    "BIT_CHOICES",
    "ActivationQuantizer",
    "ActivationSettings",
    "CompensationSettings",
    "GroupedSettings",
    "GroupedTensor",
    "IntegerSettings",
    "IntegerTensor",
    "Integers",
    "KroneckerRotation",
    "OnePlane",
    "QuantizationSettings",
    "Quantizer",
    "RotationSettings",
    "SensitivityTable",
    "SymmetricSettings",
    "TernarySettings",
    "TernaryTensor",
    "TwoPlaneSettings",
    "TwoPlanes",
    "WeightSettings",
    "accumulate_moment",
    "allocate",
    "average_bits",
    "dequantize",
    "euclidean_fit",
    "factor",
    "factor_sizes",
    "fake_quantize",
    "fit_clips",
    "fit_rotation",
    "from_codes",
    "nearest_codes",
    "pack",
    "packed_matmul",
    "propagated",
    "quantize_in_groups",
    "quantize_matrix",
    "quantize_tokens",
    "quantizer",
    "random_orthogonal",
    "relocate",
    "riemannian",
    "rotate_moment",
    "sweep_codes",
    "tri_modal_loss",
    "unpack",
    "with_bits",
]
