"""Provides the ops of inference on packed weights: pure functions of arrays, each with kernels for GPUs and TPUs.

Every op runs everywhere: `implementation=None` takes the kernel of the platform that the program is compiled for, or
the XLA reference where there is none. There is one folder an op, with the reference beside its kernels;
`docs/kernels.md` says how these work. All of it runs under `jax.jit`. `word_product` is
for CPUs, which have no kernels.

A product of quantised activations with ternary weights:

    weight = ops.kernel_weight([tensor])                             # once, from a `core` TernaryTensor
    tokens = ops.rotate_quantize(x, rotation, ops.quantizer_settings(bits=8, clip=0.9))
    y = ops.ternary_matmul(tokens, weight)                           # or both in one: `ops.quantized_linear`
"""

from twla_jax.ops.attention.kv_cache import KVCache, LayerKV, empty_layer
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.attention.splits import AttentionSplits
from twla_jax.ops.decode_attention import decode_attention
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.expert_matmul import expert_matmul
from twla_jax.ops.integer_matmul import IntegerWeight, integer_matmul, integer_rows, integer_weight
from twla_jax.ops.linear_pair import LinearOperands, linear_pair, new_pair_exchange
from twla_jax.ops.qkv_attention import new_qkv_exchange, qkv_attention
from twla_jax.ops.quantized_linear import quantized_linear
from twla_jax.ops.rotate_quantize import KernelRotation, kernel_rotation, quantizer_settings, rotate_quantize
from twla_jax.ops.ternary_matmul import KernelWeight, kernel_weight, ternary_matmul
from twla_jax.ops.tokens import QuantizedTokens
from twla_jax.ops.word_product import WordWeight, word_product, word_weight

__all__ = [
    "AttentionSplits",
    "Implementation",
    "IntegerWeight",
    "KVCache",
    "KernelRotation",
    "KernelWeight",
    "LayerKV",
    "LinearOperands",
    "Positions",
    "QuantizedTokens",
    "WordWeight",
    "decode_attention",
    "empty_layer",
    "expert_matmul",
    "integer_matmul",
    "integer_rows",
    "integer_weight",
    "kernel_rotation",
    "kernel_weight",
    "linear_pair",
    "new_pair_exchange",
    "new_qkv_exchange",
    "qkv_attention",
    "quantized_linear",
    "quantizer_settings",
    "rotate_quantize",
    "ternary_matmul",
    "word_product",
    "word_weight",
]
