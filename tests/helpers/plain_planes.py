"""A decoder of single ternary planes without rotations, as other tools' formats can hold it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from twla_jax.core import tensors
from twla_jax.core.activation import ActivationQuantizer
from twla_jax.jobs.export_model import export_model
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=97,
    hidden_size=256,
    intermediate_size=320,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
)

EXPERTS = dataclasses.replace(
    CONFIG,
    model_type="qwen3_moe",
    hidden_size=64,
    intermediate_size=128,
    head_dim=16,
    qk_norm=True,
    num_experts=3,
    experts_per_token=2,
    normalize_routing=True,
)


def plain_model(group_size, intermediate=320, offset=None, config=None):
    """A decoder of random planes without rotations, whose μ have this standard deviation; by default it has none."""
    config = config or DecoderConfig(**CONFIG.to_dict() | {"intermediate_size": intermediate})
    model = Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.float16)
    rng = np.random.default_rng(0)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        *leading, m, n = getattr(model.blocks, name).kernel.get_value().shape
        groups = -(-m // group_size)
        alpha = rng.uniform(0.01, 0.1, (*leading, n, groups))
        codes = rng.integers(-1, 2, (*leading, n, m))
        spread = rng.normal(size=alpha.shape)
        mu = None if offset is None else jnp.asarray(offset * spread)
        plane = tensors.from_codes(jnp.asarray(codes, jnp.int8), jnp.asarray(alpha), mu, group_size)
        getattr(model.blocks, name).kernel = nnx.Param(plane)
    off = ActivationQuantizer(
        bits=jnp.full(2, 16, jnp.int32), clips=jnp.ones((2, 4), jnp.float16), enabled=False
    )
    for site in model.sites:
        model.blocks.transform(site).activation = nnx.data(nnx.Param(off))
    return model


def exported(model, tmp_path, **options):
    checkpoint.save(model, None, tmp_path / "plain", Recipe(), {})
    export_model(tmp_path / "plain", tmp_path / "dest", **options)
    return tmp_path / "dest"
