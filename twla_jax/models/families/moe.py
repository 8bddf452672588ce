"""Defines mixtures of experts: a Llama block whose MLP each token takes from a few of many experts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from twla_jax.errors import TwlaError
from twla_jax.models.blocks import Context, Site, State
from twla_jax.models.config import DecoderConfig
from twla_jax.models.families.family import HfConfig
from twla_jax.models.families.llama import GGUF_TENSORS, HF_TENSORS, LlamaBlock
from twla_jax.models.layers import ExpertLinear, Linear, precision
from twla_jax.models.routing import Routing
from twla_jax.schema import Check, integer


class MoeBlock(LlamaBlock):
    """`x ← x + o(attend(qkv(norm(x))))`, then `x ← x + Σ_e w_e · down_e(silu(gate_e(norm(x))) · up_e(norm(x)))`.

    e runs over the `experts_per_token` experts to which the router, a linear that stays in full precision, gives the
    highest probability; w are these, and add up to 1 where `normalize_routing`. Experts share the rotation, the
    activation quantiser and the clips of their input: it is rotated once.
    """

    sites = (
        *LlamaBlock.sites[:2],
        Site("mlp", ("gate", "up"), norm="post_norm", experts=True),
        Site("down", ("down",), writes=True, recomputed=True, experts=True),
    )

    def __init__(self, config: DecoderConfig, *, leading: tuple[int, ...], rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, leading=leading, rngs=rngs, dtype=dtype)
        d, hidden, experts = config.hidden_size, config.intermediate_size, config.num_experts

        def linear(m: int, n: int) -> ExpertLinear:
            bias = config.mlp_bias
            return ExpertLinear(m, n, experts=experts, leading=leading, rngs=rngs, dtype=dtype, bias=bias)

        self.router = Linear(d, experts, bias=False, leading=leading, rngs=rngs, dtype=dtype)
        self.gate, self.up, self.down = linear(d, hidden), linear(d, hidden), linear(hidden, d)
        self.experts_per_token = config.experts_per_token
        self.normalize_routing = config.normalize_routing

    def after(self, site: Site, state: State, h: Any, context: Context) -> State:
        """Return the state once the linears of `site` have run on h, which went through its transform."""
        if not site.experts:
            return super().after(site, state, h, context)
        routing = self.route(state, context)
        outputs = self.expert_outputs(site, h, routing)
        if site.name == "mlp":
            gate, up = outputs
            return State(state.x, self.gated(gate, up), state.cache)
        (y,) = outputs
        mixed = jnp.einsum("btkd,btk->btd", y, routing.weights, precision=precision(y.dtype))
        return State(state.x + mixed.astype(state.x.dtype), None, state.cache)

    def gated(
        self, gate: Float[Array, "b t k hidden"], up: Float[Array, "b t k hidden"]
    ) -> Float[Array, "b t k hidden"]:
        """Return what `down` reads, `activate(gate) · up`."""
        return self.activate(gate) * up

    def route(self, state: State, context: Context) -> Routing:
        """Return each token's experts and their weights, from the stream as it is before the MLP."""
        logits = self.router(self.post_norm(state.x))
        probabilities = jax.nn.softmax(logits.astype(jnp.float32))
        weights, experts = jax.lax.top_k(probabilities, self.experts_per_token)
        if context.experts is not None:
            experts = context.experts
            weights = jnp.take_along_axis(probabilities, experts, axis=-1)
        if self.normalize_routing:
            weights = weights / weights.sum(-1, keepdims=True)
        return Routing(experts=experts, weights=weights.astype(logits.dtype))

    def expert_outputs(self, site: Site, h: Any, routing: Routing) -> tuple[Float[Array, "b t k _"], ...]:
        """Return what each linear of `site`, of each expert of a token, makes of h."""
        return tuple(linear.of_experts(h, routing.experts) for linear in self.expert_linears(site))

    def expert_linears(self, site: Site) -> tuple[ExpertLinear, ...]:
        """Return the linears of `site`, which are of experts."""
        return self.linears(site)  # pyright: ignore[reportReturnType]


_MLP = ("gate", "up", "down")
_DENSE = {f"blocks.{name}.{leaf}" for name in _MLP for leaf in ("kernel", "bias")}
# In GGUF files: the experts of a layer are one tensor.
GGUF_EXPERT_TENSORS = {
    **{path: name for path, name in GGUF_TENSORS.items() if path not in _DENSE},
    **{f"blocks.{name}.kernel": f"blk.{{}}.ffn_{name}_exps.weight" for name in _MLP},
    "blocks.router.kernel": "blk.{}.ffn_gate_inp.weight",
}


def expert_tensors(router: str, experts: dict[str, str]) -> dict[str, str]:
    """Return the names of a family's tensors in safetensors files.

    Args:
      router: of the router in a layer.
      experts: of `gate`, `up` and `down`, below `model.layers.{}.`; `{}` is the expert.
    """
    names = {path: name for path, name in HF_TENSORS.items() if path not in _DENSE}
    names |= {f"blocks.{path}.kernel": f"model.layers.{{}}.{name}" for path, name in experts.items()}
    return names | {"blocks.router.kernel": f"model.layers.{{}}.{router}"}


# What every such family's config.json has; transformers 5 writes `num_local_experts` where older files have the other.
EXPERT_KEYS: dict[str, Check] = {
    "num_experts": integer(1, 2**16),
    "num_local_experts": integer(1, 2**16),
    "num_experts_per_tok": integer(1, 2**16),
}


def expert_settings(config: HfConfig, source: str, *, default: int) -> dict[str, Any]:
    """Return how many experts there are and how many a token takes.

    Args:
      config: contents of a `config.json`, which say `num_local_experts` or `num_experts`.
      source: the file's name, for messages.
      default: experts where neither is stated.

    Raises:
      TwlaError: a token would take more than there are, or the two differ.
    """
    stated = {config[key] for key in ("num_local_experts", "num_experts") if config.get(key) is not None}
    if len(stated) > 1:
        raise TwlaError(f"{source}: num_local_experts and num_experts differ")
    count, taken = min(stated, default=default), config["num_experts_per_tok"]
    if taken > count:
        raise TwlaError(f"{source}: num_experts_per_tok {taken} of {count} experts")
    return {"num_experts": count, "experts_per_token": taken}
