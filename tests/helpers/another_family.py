"""A family that the library does not know: norms after the sublayers, GeGLU, biases, and other names for all of it."""

import jax
import numpy as np
from scipy.special import erf

from twla_jax.models.blocks import Site, State
from twla_jax.models.config import DecoderConfig
from twla_jax.models.families import Family
from twla_jax.models.families.llama import LlamaBlock
from twla_jax.models.layers import InputTransform, Linear, RMSNorm

CONFIG = DecoderConfig(
    model_type="another",
    vocab_size=95,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=64,
)


class AnotherBlock(LlamaBlock):
    """`x ← x + norm(out(attend(x)))`, then `x ← x + norm(shrink(gelu(gate(x)) · up(x)))`."""

    sites = (
        Site("tokens", ("query", "key", "value")),
        Site("heads", ("out",), writes=True),
        Site("wide", ("gate", "up")),
        Site("narrow", ("shrink",), writes=True, recomputed=True),
    )
    norms = ("attention_norm", "mlp_norm")

    def __init__(self, config, *, leading, rngs, dtype):
        d, heads, kv = (n * config.head_dim for n in (3, config.num_heads, config.num_kv_heads))
        hidden = config.intermediate_size
        shapes = {
            "query": (d, heads),
            "key": (d, kv),
            "value": (d, kv),
            "out": (heads, d),
            "gate": (d, hidden),
            "up": (d, hidden),
            "shrink": (hidden, d),
        }
        for name, (m, n) in shapes.items():
            setattr(self, name, Linear(m, n, bias=True, leading=leading, rngs=rngs, dtype=dtype))
        for site in self.sites:
            setattr(self, f"{site.name}_input", InputTransform())
        for name in self.norms:
            setattr(self, name, RMSNorm(d, epsilon=1e-6, leading=leading, dtype=dtype))
        self.q_norm = self.k_norm = None
        self.head_dim = config.head_dim

    def after(self, site, state, h, context):
        """Return the state once the linears of `site` have run."""
        if site.name == "tokens":
            mixed, cache = self.attend(site, h, state.cache, context)
            return State(state.x, mixed, cache)
        if site.name == "wide":
            return State(state.x, self.gate_up(site, h), state.cache)
        norm = self.attention_norm if site.name == "heads" else self.mlp_norm
        (y,) = self.outputs(site, h)
        return State(state.x + norm(y), None, state.cache)

    def activate(self, gate):
        """Return the gate's activation, GELU."""
        return jax.nn.gelu(gate, approximate=False)


FAMILY = Family(block=AnotherBlock, settings=lambda config, source: {}, hf_tensors={})


def written_out(model, tokens):
    """The last hidden state in float64 numpy, from the parameters alone."""

    def norm(x, scale):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * scale

    def rotated(x):  # [t, heads, 8]
        angle = np.arange(len(x))[:, None] / 10000.0 ** (np.arange(0, 8, 2) / 8)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    arrays = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model)
    x, blocks = arrays.embed.get_value()[tokens], arrays.blocks
    for layer in range(CONFIG.num_layers):

        def linear(x, name, layer=layer):
            module = getattr(blocks, name)
            return x @ module.kernel.get_value()[layer] + module.bias.get_value()[layer]

        q, k, v = (linear(x, name).reshape(len(x), -1, 8) for name in ("query", "key", "value"))
        scores = np.einsum("thd,sd->hts", rotated(q), rotated(k)[:, 0]) / np.sqrt(8)
        scores = np.where(np.tri(len(x)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hts,sd->thd", weights, v[:, 0]).reshape(len(x), -1)
        x = x + norm(linear(mixed, "out"), blocks.attention_norm.scale.get_value()[layer])
        gate = linear(x, "gate")
        hidden = gate * (1 + erf(gate / np.sqrt(2))) / 2 * linear(x, "up")
        x = x + norm(linear(hidden, "shrink"), blocks.mlp_norm.scale.get_value()[layer])
    return norm(x, arrays.norm.scale.get_value())
