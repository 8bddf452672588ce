"""Times the two parts of a refinement step that grow with the vocabulary and the windows, at Gemma-3-270M's shapes.

    python benchmarks/refine_step.py

Attention of 4 windows of 2048 tokens, forwards and backwards, by cuDNN and by plain products, in a layer with a window
and in one without; and the divergence of both models' predictions with its slope. Milliseconds, the least of five.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention import fused, reference
from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.refinement.divergence import kl_of_hidden

BATCH, TOKENS, HEADS, HEAD_DIM, WINDOW = 4, 2048, 4, 256, 512
HIDDEN, VOCABULARY = 640, 262_144


def milliseconds(run: Callable[..., Any], *arguments: Any) -> float:
    """Return the least of five runs of a compiled function."""
    jax.block_until_ready(run(*arguments))
    took = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        took.append(time.perf_counter() - start)
    return 1000 * min(took)


def attentions() -> None:
    """Print the times of attention and the largest difference of slopes, relative to the largest slope."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (BATCH, TOKENS, heads, HEAD_DIM), jnp.bfloat16)
        for key, heads in zip(keys, (HEADS, 1, 1), strict=True)
    )
    at = jnp.arange(TOKENS)
    positions = reference.Positions(query=at, key=at, cos=None, sin=None)

    def plain(q, k, v, reach):
        return reference.attention(q, LayerKV(entries=jnp.stack([k, v]).swapaxes(2, 3)), positions, reach)

    def windowed(q, k, v, reach):
        return fused.windowed_attention(q, k, v, reach, WINDOW)

    ways = {"plain": plain}
    if fused.takes_windows(HEAD_DIM):
        ways["cuDNN"] = windowed
    print(f"cuDNN attends in windows by heads of {HEAD_DIM}: {'cuDNN' in ways}", flush=True)
    for reach in (WINDOW, 2**30):
        slopes = {}
        for name, attend in ways.items():

            def total(q, k, v, reach, attend=attend):
                return (attend(q, k, v, reach).astype(jnp.float32) ** 2).sum()

            run = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
            took = milliseconds(run, q, k, v, jnp.int32(reach))
            slopes[name] = [np.asarray(each, np.float32) for each in run(q, k, v, jnp.int32(reach))]
            print(f"attention, reach {reach}, {name}: {took:.2f} ms", flush=True)
        pairs = zip(slopes["plain"], slopes.get("cuDNN", slopes["plain"]), strict=True)
        print(
            f"  slopes apart by {max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs):.4f}",
            flush=True,
        )


def divergence() -> None:
    """Print the time of the loss with its slope, and of the same left to automatic differentiation."""
    config = DecoderConfig(
        model_type="llama",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=1,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    got, expected = (
        jax.random.normal(jax.random.key(i), (BATCH, TOKENS, HIDDEN), jnp.bfloat16) for i in range(2)
    )

    def derived(model, got, expected):
        def chunk(chunk):
            p, q = chunk
            p, q = (jax.nn.log_softmax(model.logits(h)) for h in (p, q))
            return (jnp.exp(p) * (p - q)).sum() / (BATCH * TOKENS)

        def slope(chunk_):
            return jax.value_and_grad(lambda q: chunk((chunk_[0], q)))(chunk_[1])

        parts = (h.reshape(BATCH, -1, 256, HIDDEN).swapaxes(0, 1) for h in (expected, got))
        return jax.lax.map(slope, tuple(parts))

    def written(model, got, expected):
        return jax.value_and_grad(lambda h: kl_of_hidden(model, model, h, expected, BATCH * TOKENS))(got)

    for name, run in (("written out", written), ("derived", derived)):
        took = milliseconds(jax.jit(run), model, got, expected)
        print(f"divergence over {VOCABULARY} tokens, {name}: {took:.1f} ms", flush=True)


if __name__ == "__main__":
    attentions()
    divergence()
