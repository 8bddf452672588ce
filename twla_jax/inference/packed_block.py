"""Runs a block fast: each input is one op, the linears that read it are one matrix.

Any family's block is packed: its own chain runs on packed inputs and linears. Attention, gate and the residual's way
from attention to the MLP go through fused kernels where a family computes them as `LlamaBlock` does.
"""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from twla_jax.inference import tensor_parallel
from twla_jax.inference.packed_cache import PackedLayer
from twla_jax.inference.packed_experts import PackedExperts
from twla_jax.inference.packed_linear import FewTokens, KernelInput, KernelLinear, Ungated
from twla_jax.models.blocks import ChainBlock, Context, Site, State, run
from twla_jax.models.families.llama import LlamaBlock
from twla_jax.models.layers import RMSNorm
from twla_jax.models.routing import Routing
from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import AttentionSplits, decode_attention
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.linear_pair import LinearOperands, linear_pair, new_pair_exchange
from twla_jax.ops.qkv_attention import new_qkv_exchange, qkv_attention


def packed_block(
    block: ChainBlock, *, dtype: jnp.dtype, mesh: Mesh | None, implementation: Implementation | None
) -> "PackedBlock":
    """Return one block with its inputs and linears packed.

    Args:
      block: of one layer, on the device.
      dtype: what it computes in.
      mesh: with an axis `model`, or None for one device.
      implementation: as `ternary_matmul` and `rotate_quantize` take it.
    """
    return packed_class(type(block))(block, dtype=dtype, mesh=mesh, implementation=implementation)


@functools.cache
def packed_class(family: type[ChainBlock]) -> type["PackedBlock"]:
    """Return the class of a family's packed blocks; always the same one, so that programs are compiled once."""
    if not issubclass(family, LlamaBlock):
        return type(f"Packed{family.__name__}", (PackedBlock, family), {})
    names = ("sites", *vars(ChainBlock), *vars(LlamaBlock))
    shared = frozenset(name for name in names if getattr(family, name) is getattr(LlamaBlock, name))
    return type(f"Packed{family.__name__}", (PackedLlamaBlock, family), {"shared": shared})


class PackedBlock(ChainBlock):
    """Packs the inputs and linears of any family; `packed_class` makes a class for each family of it.

    An RMSNorm right before an input belongs to that input's op, and the linears of a site are `{site}_linear`.
    """

    def __init__(
        self,
        block: ChainBlock,
        *,
        dtype: jnp.dtype,
        mesh: Mesh | None,
        implementation: Implementation | None,
    ):
        packed = {name for site in block.sites for name in (f"{site.name}_input", *site.linears)}
        for site in block.sites:
            norm = None if site.norm is None else getattr(block, site.norm)
            norm = None if site.experts else norm  # which a router reads, too
            if isinstance(norm, RMSNorm):
                setattr(self, str(site.norm), _nothing)
                packed.add(str(site.norm))
            options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "implementation": implementation}
            taken = norm if isinstance(norm, RMSNorm) else None
            setattr(self, f"{site.name}_input", KernelInput(block, site, norm=taken, **options))
            linear = PackedExperts if site.experts else KernelLinear
            setattr(self, f"{site.name}_linear", linear(block, site, **options))
        for name, value in vars(block).items():
            if name not in packed and not name.startswith("_"):
                setattr(self, name, value)
        self.mesh = mesh
        self.implementation: Implementation | None = implementation

    def input(self, site: Site) -> KernelInput:
        """Return the packed input of `site`."""
        return getattr(self, f"{site.name}_input")

    def linear(self, site: Site) -> KernelLinear:
        """Return the one matrix of the linears of `site`."""
        return getattr(self, f"{site.name}_linear")

    def outputs(self, site: Site, h: Any) -> tuple[Float[Array, "b t _"], ...]:
        """Return what each linear of `site` makes of h, from its packed input."""
        return self.linear(site).parts(h)

    def expert_outputs(self, site: Site, h: Any, routing: Routing) -> tuple[Float[Array, "b t k _"], ...]:
        """Return what each linear of `site`, of each expert of a token, makes of h, from its packed input."""
        return getattr(self, f"{site.name}_linear")(h, routing.experts)

    def add_output(self, site: Site, h: Any, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the residual stream x with the output of the one linear of `site` added, where that ends if it can."""
        if type(self).to_stream is ChainBlock.to_stream:
            return self.linear(site)(h, x)
        return ChainBlock.add_output(self, site, h, x)

    def with_scratch(self, layer: LayerKV) -> PackedLayer:
        """Return a cache's layer with the memory that the block's kernels pass numbers to each other through."""
        return PackedLayer(entries=layer.entries, scales=layer.scales)


class PackedLlamaBlock(PackedBlock, LlamaBlock):
    """Packed blocks of families that change single methods of `LlamaBlock`: the rest runs in its fused kernels.

    Attributes:
      shared: names of what the family has as `LlamaBlock` does.
    """

    shared: ClassVar[frozenset[str]]

    def decode(
        self, x: Float[Array, "b t d"], cache: LayerKV, context: Context
    ) -> tuple[Float[Array, "b t d"], LayerKV]:
        """Return what `ChainBlock.decode` does; of one token, output linear and the MLP's first may be one op."""
        pair = self.pair()
        scratch = cache.scratch.pair if isinstance(cache, PackedLayer) else None
        if context.positions.tokens > 1 or scratch is None or pair is None:
            return super().decode(x, cache, context)
        state = run(self, State(x, cache=cache), context, 0, 1)
        assert isinstance(state.cache, PackedLayer)
        tokens = state.inner if isinstance(state.inner, AttentionSplits) else state.inner[:, 0]
        options = {"exchange": scratch, "implementation": self.implementation}
        h, hidden, exchange = linear_pair(tokens, *pair, x[:, 0], **options)
        layer = state.cache.with_scratch(pair=exchange)
        state = run(self, State(h[:, None], hidden[:, None], layer), context, 3)
        return state.x, layer

    def pair(self) -> tuple[LinearOperands, LinearOperands] | None:
        """Return the output linear and the MLP's first ones for `linear_pair`; None if not single ternary planes."""
        if not self.shared.issuperset({"sites", "before", "after", "gate_up", "activate", "to_stream"}):
            return None
        o, gate_up = (self.input(site).operands(self.linear(site)) for site in self.sites[1:3])
        return None if o is None or gate_up is None else (o, gate_up)

    def attend(
        self, site: Site, h: Any, cache: LayerKV | None, context: Context
    ) -> tuple[Any, LayerKV | None]:
        """Return the attention's mix and the cache; of one token they are one op, which may leave the mix in parts."""
        kernels, linear = self.shared.issuperset({"attend", "project", "score_changes"}), self.linear(site)
        if kernels and self.mesh is not None and cache is not None:
            kernels = tensor_parallel.splits_heads(linear.weight.get_value(), cache, self.mesh)
        if cache is None or context.positions.tokens > 1 or not kernels:
            return super().attend(site, h, cache, context)
        scales, epsilon = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            scales = self.q_norm.scale.get_value(), self.k_norm.scale.get_value()
            epsilon = self.q_norm.epsilon
        if self.mesh is not None:
            options = {"norm_scales": scales, "epsilon": epsilon, "implementation": self.implementation}

            def op(qkv: jax.Array, layer: LayerKV, positions: Positions) -> tuple[Any, LayerKV]:
                heads = qkv.reshape(len(qkv), -1, self.head_dim)
                return decode_attention(heads, layer, positions, context.reach, **options)

            operands = linear(h)[:, 0], cache.stores, context.positions
            mixed, stores = tensor_parallel.attend(op, *operands, self.mesh)
            return mixed[:, None], cache.with_stores(stores)
        where = {"layer": cache, "positions": context.positions, "window": context.reach}
        where |= {"apart": self.takes_splits, "implementation": self.implementation}
        if isinstance(h, FewTokens) and (plane := linear.plane) is not None:
            assert not isinstance(h.x, AttentionSplits)
            where |= {"head_norm_scales": scales, "head_epsilon": epsilon} | h.settings
            exchange = cache.scratch.qkv if isinstance(cache, PackedLayer) else None
            mixed, cache, exchange = qkv_attention(h.x[:, 0], weight=plane, exchange=exchange, **where)
            cache = cache.with_scratch(qkv=exchange) if isinstance(cache, PackedLayer) else cache
        else:
            qkv = linear(h)
            qkv = qkv.reshape(len(qkv), -1, self.head_dim)
            mixed, cache = decode_attention(qkv, norm_scales=scales, epsilon=epsilon, **where)
        return mixed if isinstance(mixed, AttentionSplits) else mixed[:, None], cache

    def gate_up(self, site: Site, h: Any) -> Any:
        """Return what `down` reads, or where its input's op can begin with the gate, both outputs as they lie."""
        following = self.sites[self.sites.index(site) + 1]
        if not self.shared.issuperset({"gate_up", "activate"}):
            return super().gate_up(site, h)
        if isinstance(h, FewTokens):
            return self.linear(site)(h, gated=True)
        if self.shared.issuperset({"sites", "before", "after"}) and self.input(following).takes_gate:
            return Ungated(outputs=self.linear(site)(h))  # without a pass between the two linears
        return super().gate_up(site, h)

    @property
    def takes_splits(self) -> bool:
        """Returns whether attention may be left in parts for the output linear: a single ternary plane, on one GPU."""
        gpu = self.implementation == "gpu" or (self.implementation is None and jax.default_backend() == "gpu")
        standard = self.shared.issuperset({"before", "attend", "project", "score_changes", "to_stream"})
        standard &= self.sites[:2] == LlamaBlock.sites[:2]
        site = self.sites[1]
        one_plane = self.input(site).makes_codes and self.linear(site).plane is not None
        return gpu and standard and self.mesh is None and one_plane

    def with_scratch(self, layer: LayerKV) -> PackedLayer:
        """Return a cache's layer with the memory that `qkv_attention` and `linear_pair` need to be one kernel each."""
        packed = super().with_scratch(layer)
        if not self.takes_splits:
            return packed
        site = self.sites[0]
        qkv, pair = self.input(site).operands(self.linear(site)), self.pair()
        if qkv is not None:
            wide = qkv.settings is None
            packed = packed.with_scratch(qkv=new_qkv_exchange(layer, qkv.rotation, qkv.weight, wide=wide))
        if pair is not None:
            packed = packed.with_scratch(pair=new_pair_exchange(layer.entries.shape[1], *pair))
        return packed


def _nothing(x: jax.Array) -> jax.Array:
    """Return x: stands where the family's block has a norm that the input's op does here."""
    return x
