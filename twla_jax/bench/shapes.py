"""Defines published model shapes, and makes random weights of these shapes on the device in the kernels' layout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from twla_jax.core.activation import BIT_CHOICES, OFF, ActivationQuantizer
from twla_jax.core.kotms import KroneckerRotation, factor_sizes
from twla_jax.core.packing import packed_width
from twla_jax.core.stiefel import random_orthogonal
from twla_jax.core.tensors import IntegerTensor, TernaryTensor
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.ops.integer_matmul import IntegerWeight, integer_weight
from twla_jax.ops.rotate_quantize import KernelRotation, kernel_rotation
from twla_jax.ops.ternary_matmul import KernelWeight, kernel_weight
from twla_jax.ops.tokens import QuantizedTokens, group_sums

_GROUP = 128


def _shape(vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, **settings) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        **{"model_type": "llama", "max_position_embeddings": 8192, **settings},
    )


SHAPES: dict[str, DecoderConfig] = {
    "llama-2-7b": _shape(32000, 4096, 11008, 32, 32, 32, 128),
    "llama-2-70b": _shape(32000, 8192, 28672, 80, 64, 8, 128),
    "qwen3-8b": _shape(151936, 4096, 12288, 36, 32, 8, 128, model_type="qwen3", qk_norm=True),
    "smollm2-135m": _shape(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True),
    "tiny": _shape(256, 512, 1024, 2, 8, 4, 64),
}


def matrices(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return the rows and columns of a block's matrices; those that share an input are one."""
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    d, hidden = config.hidden_size, config.intermediate_size
    return {"q,k,v": (heads + 2 * kv, d), "o": (d, heads), "gate,up": (2 * hidden, d), "down": (d, hidden)}


def quantized_weights(config: DecoderConfig) -> int:
    """Return the number of weights in the matrices of all blocks."""
    experts: dict[str, int] = dict.fromkeys(("gate,up", "down"), config.num_experts or 1)
    return config.num_layers * sum(n * m * experts.get(name, 1) for name, (n, m) in matrices(config).items())


def ternary_tensor(key: Array, n: int, m: int, lead: tuple[int, ...] = ()) -> TernaryTensor:
    """Return random codes, with (α, μ) for every 128 columns such that outputs have the variance of the inputs."""
    keys = jax.random.split(key)
    bits = jax.random.bits(keys[0], (*lead, n, packed_width(m)), jnp.uint8)
    codes = bits & ~((bits & (bits >> 1) & 0x55) * 3)  # a 3 becomes a 0: −1 half of the time
    alpha = 1.2 * m**-0.5 * jax.random.uniform(keys[1], (*lead, n, -(-m // _GROUP)), minval=0.5, maxval=1.5)
    return TernaryTensor(
        codes=codes,
        alpha=alpha.astype(jnp.float16),
        mu=(alpha / 4).astype(jnp.float16),
        in_features=m,
        group_size=_GROUP,
    )


def weight(key: Array, n: int, m: int) -> KernelWeight:
    """Return a random matrix in the kernels' layout."""
    return kernel_weight([ternary_tensor(key, n, m)])


def integer_tensor(key: Array, n: int, m: int, bits: int, size: float) -> IntegerTensor:
    """Return random codes, with the zero in their middle and a scale for every 128 columns, for weights near `size`."""
    groups = (n, -(-m // _GROUP))
    scale = size * 12**0.5 / 2**bits * jax.random.uniform(key, groups, minval=0.5, maxval=1.5)
    return IntegerTensor(
        codes=jax.random.bits(key, (n, m), jnp.uint8) >> (8 - bits),
        scale=scale.astype(jnp.float16),
        zero_point=jnp.full(groups, 2 ** (bits - 1), jnp.uint8),
        in_features=m,
        group_size=_GROUP,
        bits=bits,
    )


def head(key: Array, n: int, m: int, bits: int) -> IntegerWeight:
    """Return a random LM head in the kernels' layout."""
    return integer_weight(integer_tensor(key, n, m, bits, m**-0.5))


def tokens(key: Array, t: int, m: int) -> QuantizedTokens:
    """Return random 8-bit codes."""
    codes = jax.random.randint(key, (t, m), -128, 128, jnp.int8)
    return QuantizedTokens(
        codes=codes, scale=jnp.full(t, 0.01), zero_point=jnp.full(t, 3.0), sums=group_sums(codes)
    )


def rotation(key: Array, m: int, n: int) -> KroneckerRotation:
    """Return a random rotation, with factors as near to each other as m allows."""
    factors = (random_orthogonal(k, s) for k, s in zip(jax.random.split(key), _factors(m, n), strict=True))
    return KroneckerRotation(*(factor.astype(jnp.float16) for factor in factors))


def rotation_for_kernels(key: Array, m: int, n: int) -> KernelRotation:
    """Return the same rotation in the kernels' layout, in bf16."""
    return kernel_rotation(rotation(key, m, n), jnp.bfloat16)


def _factors(m: int, n: int) -> tuple[int, int]:
    return factor_sizes(m, n, "balanced")


def random_decoder(
    config: DecoderConfig,
    *,
    activation_bits: int | None,
    embedding_bits: int = OFF,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> Decoder:
    """Return a random model prepared for inference in bf16: ternary, or float where `activation_bits` is None.

    Embedding and LM head are integers of `embedding_bits`, or floats where those are 16.

    One block is made and copied for every layer, so that no model ever exists unpacked. On a mesh it is split as
    `prepare_for_inference` says.
    """
    model = random_model(
        dataclasses.replace(config, num_layers=1),
        activation_bits=activation_bits,
        embedding_bits=embedding_bits,
        seed=seed,
    )
    prepared = prepare_for_inference(model, mesh=mesh, unpack=False)
    copy = jax.jit(lambda block: jax.tree.map(jnp.copy, block))
    (block,) = prepared.blocks  # pyright: ignore[reportGeneralTypeIssues]
    blocks: Any = nnx.List([block, *(copy(block) for _ in range(config.num_layers - 1))])
    prepared.blocks = blocks
    prepared.config = config
    return prepared


def random_model(
    config: DecoderConfig, *, activation_bits: int | None, embedding_bits: int = OFF, seed: int = 0
) -> Decoder:
    """Return a random model in bf16 as the quantiser gives it or, without activation bits, as a file does."""

    def make():
        model = Decoder(config, rngs=nnx.Rngs(seed), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        if activation_bits is not None:
            _quantize_randomly(model, activation_bits, jax.random.key(seed))
        if embedding_bits < OFF:
            _quantize_embeddings_randomly(model, embedding_bits, jax.random.key(seed))
        return model

    # One program, so that XLA never makes the float weights that ternary ones replace.
    return jax.jit(make)()


def _quantize_embeddings_randomly(model: Decoder, bits: int, key: Array) -> None:
    sizes = model.config.vocab_size, model.config.hidden_size
    embed: Any = nnx.Param(integer_tensor(key, *sizes, bits, 0.02))
    model.embed = embed
    if model.head is not None:
        model.head.kernel = nnx.Param(integer_tensor(key, *sizes, bits, sizes[1] ** -0.5))


def _quantize_randomly(model: Decoder, bits: int, key: Array) -> None:
    layers = model.config.num_layers
    for site in model.sites:
        *_, (m, n) = (linear.features for linear in model.blocks.linears(site))
        for linear in model.blocks.linears(site):
            key, part = jax.random.split(key)
            *lead, m, n = linear.kernel.shape
            linear.kernel = nnx.Param(ternary_tensor(part, n, m, tuple(lead)))
        transform = model.blocks.transform(site)
        rotations = jax.vmap(lambda key, m=m, n=n: rotation(key, m, n))(jax.random.split(key, layers))
        transform.rotation = nnx.data(nnx.Param(rotations))
        quantizer = ActivationQuantizer(
            bits=jnp.full(layers, bits, jnp.int32),
            clips=jnp.full((layers, len(BIT_CHOICES)), 0.9, jnp.float16),
            enabled=bits < OFF,
        )
        transform.activation = nnx.data(nnx.Param(quantizer))


def activations(key: jax.Array, t: int, m: int) -> jax.Array:
    """Return random activations in bf16."""
    return jax.random.normal(key, (t, m), jnp.bfloat16)


def bytes_of(make) -> int:
    """Return the bytes of what `make` makes from a key, without making it."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: make(jax.random.key(0))))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
