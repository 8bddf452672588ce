"""Defines Llama (also SmolLM, TinyLlama and others): RMSNorm before each sublayer, rotary attention, SwiGLU."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from twla_jax.models.blocks import ChainBlock, Context, Site, State
from twla_jax.models.config import DecoderConfig
from twla_jax.models.families.family import Family, HfConfig
from twla_jax.models.layers import InputTransform, Linear, RMSNorm
from twla_jax.ops.attention import fused, rope
from twla_jax.ops.attention.kv_cache import LayerKV, write
from twla_jax.ops.attention.reference import Positions, attention


class LlamaBlock(ChainBlock):
    """`x ← x + o(attend(qkv(norm(x))))`, then `x ← x + down(silu(gate(norm(x))) · up(norm(x)))`.

    Other families change single methods: `activate`, `project`, `score_changes`, `after`. Packed blocks run kernels
    for those that are as here.
    """

    sites = (
        Site("qkv", ("q", "k", "v"), norm="input_norm"),
        Site("o", ("o",), writes=True),
        Site("mlp", ("gate", "up"), norm="post_norm"),
        Site("down", ("down",), writes=True, recomputed=True),
    )
    norms = ("input_norm", "post_norm")

    def __init__(self, config: DecoderConfig, *, leading: tuple[int, ...], rngs: nnx.Rngs, dtype: jnp.dtype):
        d, heads, kv_heads = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )

        def linear(m: int, n: int, bias: bool) -> Linear:
            return Linear(m, n, bias=bias, leading=leading, rngs=rngs, dtype=dtype)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, epsilon=config.rms_norm_eps, leading=leading, dtype=dtype)

        self.input_norm, self.post_norm = norm(d), norm(d)
        self.q = linear(d, heads, config.qkv_bias)
        self.k = linear(d, kv_heads, config.qkv_bias)
        self.v = linear(d, kv_heads, config.qkv_bias)
        self.o = linear(heads, d, config.o_bias)
        self.q_norm = norm(config.head_dim) if config.qk_norm else None
        self.k_norm = norm(config.head_dim) if config.qk_norm else None
        self.gate = linear(d, config.intermediate_size, config.mlp_bias)
        self.up = linear(d, config.intermediate_size, config.mlp_bias)
        self.down = linear(config.intermediate_size, d, config.mlp_bias)
        self.qkv_input, self.o_input = InputTransform(), InputTransform()
        self.mlp_input, self.down_input = InputTransform(), InputTransform()
        self.head_dim = config.head_dim

    def after(self, site: Site, state: State, h: Any, context: Context) -> State:
        """Return the state once the linears of `site` have run on h, which went through its transform."""
        if site.name == "qkv":
            mixed, cache = self.attend(site, h, state.cache, context)
            return State(state.x, mixed, cache)
        if site.name == "mlp":
            return State(state.x, self.gate_up(site, h), state.cache)
        return State(self.add_output(site, h, state.x), None, state.cache)

    def attend(
        self, site: Site, h: Any, cache: LayerKV | None, context: Context
    ) -> tuple[Any, LayerKV | None]:
        """Return the attention's mix `[b, t, heads·hd]`, and the cache with these tokens added, if there is one."""
        positions, changes = context.positions, self.score_changes()
        fusable = context.fused and not changes
        q, k, v = self.project(self.outputs(site, h), positions)
        if cache is not None:
            cache = write(cache, k, v, positions.start)
            many = positions.tokens > 1 and not positions.start.ndim
            if fusable and context.window is None and many and fused.takes_chunks():
                return fused.chunk_attention(q, cache, positions), cache
        elif fusable and q.shape[1] == k.shape[1]:
            if context.window is None:
                return fused.fused_attention(q, k, v), None
            return fused.windowed_attention(q, k, v, context.reach, context.window), None
        layer = LayerKV(entries=jnp.stack([k, v]).swapaxes(2, 3)) if cache is None else cache
        return attention(q, layer, positions, context.reach, **changes), cache

    def score_changes(self) -> dict[str, Any]:
        """Return what `attention` takes to change the scores, `softcap` or `sinks`; no fused kernel knows either."""
        return {}

    def project(
        self, outputs: tuple[Float[Array, "b t _"], ...], positions: Positions
    ) -> tuple[Float[Array, "b t heads hd"], Float[Array, "b t kv hd"], Float[Array, "b t kv hd"]]:
        """Return queries, keys and values; queries and keys normed where so set, and rotated to their positions."""
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in outputs)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rope.rotate(q, positions.cos, positions.sin), rope.rotate(k, positions.cos, positions.sin), v

    def gate_up(self, site: Site, h: Any) -> Any:
        """Return `activate(gate(h)) · up(h)`, `[b, t, hidden]`."""
        gate, up = self.outputs(site, h)
        return self.activate(gate) * up

    def activate(self, gate: Float[Array, "b t hidden"]) -> Float[Array, "b t hidden"]:
        """Return the gate's activation, `silu`."""
        return jax.nn.silu(gate)


HF_TENSORS = {
    "embed": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
    "blocks.input_norm.scale": "model.layers.{}.input_layernorm.weight",
    "blocks.post_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.q.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.k.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.v.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.o.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks.k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks.v.bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks.o.bias": "model.layers.{}.self_attn.o_proj.bias",
    "blocks.q_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.k_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.gate.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.up.kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks.down.kernel": "model.layers.{}.mlp.down_proj.weight",
    "blocks.gate.bias": "model.layers.{}.mlp.gate_proj.bias",
    "blocks.up.bias": "model.layers.{}.mlp.up_proj.bias",
    "blocks.down.bias": "model.layers.{}.mlp.down_proj.bias",
}
GGUF_TENSORS = {
    "embed": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "head.kernel": "output.weight",
    "blocks.input_norm.scale": "blk.{}.attn_norm.weight",
    "blocks.post_norm.scale": "blk.{}.ffn_norm.weight",
    "blocks.q.kernel": "blk.{}.attn_q.weight",
    "blocks.k.kernel": "blk.{}.attn_k.weight",
    "blocks.v.kernel": "blk.{}.attn_v.weight",
    "blocks.o.kernel": "blk.{}.attn_output.weight",
    "blocks.q.bias": "blk.{}.attn_q.bias",
    "blocks.k.bias": "blk.{}.attn_k.bias",
    "blocks.v.bias": "blk.{}.attn_v.bias",
    "blocks.o.bias": "blk.{}.attn_output.bias",
    "blocks.q_norm.scale": "blk.{}.attn_q_norm.weight",
    "blocks.k_norm.scale": "blk.{}.attn_k_norm.weight",
    "blocks.gate.kernel": "blk.{}.ffn_gate.weight",
    "blocks.up.kernel": "blk.{}.ffn_up.weight",
    "blocks.down.kernel": "blk.{}.ffn_down.weight",
    "blocks.gate.bias": "blk.{}.ffn_gate.bias",
    "blocks.up.bias": "blk.{}.ffn_up.bias",
    "blocks.down.bias": "blk.{}.ffn_down.bias",
}


def _settings(config: HfConfig, source: str) -> dict[str, Any]:
    bias = config.get("attention_bias", False)  # transformers has no window here
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": config.get("mlp_bias", False)}


FAMILIES = {
    "llama": Family(
        block=LlamaBlock,
        settings=_settings,
        defaults={"bos_token_id": 1, "eos_token_id": 2},
        hf_tensors=HF_TENSORS,
        gguf_architecture="llama",
        gguf_tensors=GGUF_TENSORS,
        gguf_interleaved=True,
    )
}
