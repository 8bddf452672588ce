"""A decoder in the form that runs fast: kernel-ready weights, one product an input, integers where it can.

Each input of a block goes once through `rotate_quantize`, and the linears that read it are one `ternary_matmul`; for a
token or a few both are one `quantized_linear`. Where an input's activations are not quantised, they are only rotated,
and meet the same packed weights in bf16. A model that is not quantised gets the same form, with one dense product an
input. An embedding and an LM head of integers stay packed, too: `integer_matmul` makes the logits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32

from twla_jax.core.tensors import IntegerTensor, dequantize
from twla_jax.devices import warn_if_triton_gemm
from twla_jax.errors import TwlaError
from twla_jax.inference import tensor_parallel
from twla_jax.inference.packed_cache import PackedCache, PackedLayer
from twla_jax.inference.packed_linear import FewTokens, KernelInput, KernelLinear, for_kernels
from twla_jax.models.decoder import SITES, Block, Decoder
from twla_jax.models.sharding import shardings
from twla_jax.ops.attention.kv_cache import KVCache, LayerKV, empty_layer
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import AttentionSplits, decode_attention
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.integer_matmul import IntegerWeight, integer_matmul, integer_rows, integer_weight, obstacle
from twla_jax.ops.linear_pair import LinearOperands, linear_pair, new_pair_exchange
from twla_jax.ops.qkv_attention import new_qkv_exchange, qkv_attention
from twla_jax.ops.tokens import QuantizedTokens


def prepare_for_inference(
    model: Decoder, *, mesh: Mesh | None = None, implementation: Implementation | None = None
) -> Decoder:
    """The same model with its weights in the kernels' layout, layer by layer, and float ones in the model's `dtype`.

    Whether an input is quantised is fixed from here on, not at how many bits. It is for inference alone: it has no
    gradient, and is not saved.

    Args:
      model: as arrays, not tracers.
      mesh: with an axis `model`, over which the rows of every linear go, and usually `data`, over which batches go;
        None for one device.
      implementation: as `ternary_matmul` and `rotate_quantize` take it.
    Raises:
      TwlaError: its weights are integers, or of a group size that the kernels have no place for.
    """
    warn_if_triton_gemm()
    if isinstance(model.blocks.q.kernel.get_value(), IntegerTensor):
        raise TwlaError("there are no kernels for integer weights, only for ternary and float ones")
    if mesh is not None:
        model = jax.device_put(model, shardings(model, mesh))
    return IntegerDecoder(model, mesh=mesh, implementation=implementation)


class IntegerDecoder(Decoder):
    """`Decoder` with a list of `IntegerBlock`s, run one after the other: a scan would copy each layer's weights."""

    def __init__(self, model: Decoder, *, mesh: Mesh | None, implementation: Implementation | None):
        self.config, self.dtype, self.mesh = model.config, model.dtype, mesh
        self.implementation: Implementation | None = implementation
        self.norm = model.norm
        table = functools.partial(_table, dtype=model.dtype, mesh=mesh)
        self.embed = nnx.Param(table(model.embed.get_value()))
        self.head = model.head
        if model.head is not None:
            self.head = nnx.merge(*nnx.split(model.head))
            self.head.kernel = nnx.Param(table(model.head.kernel.get_value(), columns=True))
        self.blocks = nnx.List(
            [
                IntegerBlock(
                    _layer(model.blocks, i), dtype=model.dtype, mesh=mesh, implementation=implementation
                )
                for i in range(model.config.num_layers)
            ]
        )

    def embed_tokens(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The first block's input, in `dtype`; of packed rows, only the tokens' are unpacked."""
        table = self.embed.get_value()
        if isinstance(table, IntegerWeight):
            return integer_rows(table, tokens, self.dtype)
        return super().embed_tokens(tokens)

    def logits(self, h: Float[Array, "*tokens d"]) -> Float[Array, "*tokens vocab"]:
        """Logits from `hidden`'s output, accumulated and returned in float32."""
        kernel = self.embed.get_value() if self.head is None else self.head.kernel.get_value()
        if isinstance(kernel, IntegerWeight):
            return integer_matmul(h, kernel, out_dtype=jnp.float32, implementation=self.implementation)
        return super().logits(h)

    def through_blocks(self, step: Callable, carry: Any) -> Any:
        """The carry after `step(carry, (block, window, index))` of every block, in order."""
        windows = self.windows()
        for index, block in enumerate(self.blocks):
            carry, _ = step(carry, (block, windows[index], index))
        return carry

    def init_cache(self, batch: int, size: int, dtype=None) -> KVCache:
        """An empty cache for `size` positions, layer by layer, in `dtype`: see `Decoder.init_cache`."""
        shape = self._cache_shape(batch, size)
        layers = (empty_layer(shape, dtype or self.dtype) for _ in self.blocks)
        layers = tuple(
            block.with_scratch(layer)  # pyright: ignore[reportAttributeAccessIssue]
            for layer, block in zip(layers, self.blocks, strict=True)
        )
        stores, scratch = tuple(layer.stores for layer in layers), tuple(layer.scratch for layer in layers)
        cache = PackedCache(layers=stores, scratch=scratch, length=jnp.int32(0))
        return cache if self.mesh is None else tensor_parallel.place_cache(cache, self.mesh)


class IntegerBlock(Block):
    """`Block` whose norms belong to the inputs that they precede, and whose linears are merged input by input."""

    def __init__(self, block: Block, *, dtype, mesh: Mesh | None, implementation: Implementation | None):
        def read(site, norm):
            return KernelInput(block, site, norm=norm, dtype=dtype, mesh=mesh, implementation=implementation)

        def linear(*names):
            return KernelLinear(block, names, dtype=dtype, mesh=mesh, implementation=implementation)

        self.input_norm = self.post_norm = _nothing
        self.qkv_input, self.mlp_input = read("qkv", block.input_norm), read("mlp", block.post_norm)
        self.o_input, self.down_input = read("o", None), read("down", None)
        self.qkv_linear, self.gate_up_linear = linear(*SITES["qkv"]), linear(*SITES["mlp"])
        self.o, self.down = linear(*SITES["o"]), linear(*SITES["down"])
        self.q_norm, self.k_norm, self.head_dim = block.q_norm, block.k_norm, block.head_dim
        self.fused = block.fused
        self.mesh = mesh
        self.implementation: Implementation | None = implementation

    def decode(
        self, x: Float[Array, "b t d"], layer: LayerKV, positions: Positions, window: Int32[Array, ""]
    ) -> tuple[Float[Array, "b t d"], LayerKV]:
        """As `Block.decode`; for a single token the output linear and the MLP's first ones may be one op."""
        mixed, layer = self.attend_cached(self.qkv_input(x), layer, positions, window)
        pair = self.pair()
        if (
            len(positions.query) > 1
            or not isinstance(layer, PackedLayer)
            or layer.scratch.pair is None
            or pair is None
        ):
            return self.finish(x, mixed), layer
        tokens = mixed if isinstance(mixed, AttentionSplits) else mixed[:, 0]
        options = {"exchange": layer.scratch.pair, "implementation": self.implementation}
        h, hidden, exchange = linear_pair(tokens, *pair, x[:, 0], **options)
        return self.down(self.down_input(hidden[:, None]), h[:, None]), layer.with_scratch(pair=exchange)

    def pair(self) -> tuple[LinearOperands, LinearOperands] | None:
        """The output linear and the MLP's first ones for `linear_pair`; None if they are not single ternary planes."""
        o, gate_up = (
            site.operands(linear)
            for site, linear in ((self.o_input, self.o), (self.mlp_input, self.gate_up_linear))
        )
        return None if o is None or gate_up is None else (o, gate_up)

    def attend_cached(
        self,
        h: Any,  # what `qkv` takes
        layer: LayerKV,
        positions: Positions,
        window: Int32[Array, ""],
    ) -> tuple[Any, LayerKV]:  # what `finish` takes
        """As `Block.attend_cached`; for a single token it is one op, which may leave the mix in parts."""
        if len(positions.query) > 1 or self.mesh is not None:
            return super().attend_cached(h, layer, positions, window)
        scales, epsilon = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            scales = self.q_norm.scale.get_value(), self.k_norm.scale.get_value()
            epsilon = self.q_norm.epsilon
        where = {"layer": layer, "positions": positions, "window": window}
        where |= {"apart": self.takes_splits, "implementation": self.implementation}
        if isinstance(h, FewTokens) and (plane := self.qkv_linear.plane) is not None:
            assert not isinstance(h.x, AttentionSplits)
            where |= {"head_norm_scales": scales, "head_epsilon": epsilon} | h.settings
            exchange = layer.scratch.qkv if isinstance(layer, PackedLayer) else None
            mixed, layer, exchange = qkv_attention(h.x[:, 0], weight=plane, exchange=exchange, **where)
            layer = layer.with_scratch(qkv=exchange) if isinstance(layer, PackedLayer) else layer
        else:
            qkv = self.qkv_linear(h)
            qkv = qkv.reshape(len(qkv), -1, self.head_dim)
            mixed, layer = decode_attention(qkv, norm_scales=scales, epsilon=epsilon, **where)
        return mixed if isinstance(mixed, AttentionSplits) else mixed[:, None], layer

    @property
    def takes_splits(self) -> bool:
        """Whether attention may be left in parts for the output linear: a single ternary plane, on one GPU."""
        gpu = self.implementation == "gpu" or (self.implementation is None and jax.default_backend() == "gpu")
        return gpu and self.mesh is None and self.o_input.makes_codes and self.o.plane is not None

    def with_scratch(self, layer: LayerKV) -> PackedLayer:
        """Adds to a cache's layer the memory that `qkv_attention` and `linear_pair` need to be one kernel each."""
        packed = PackedLayer(entries=layer.entries, scales=layer.scales)
        if not self.takes_splits:
            return packed
        qkv, pair = self.qkv_input.operands(self.qkv_linear), self.pair()
        if qkv is not None:
            packed = packed.with_scratch(
                qkv=new_qkv_exchange(layer, qkv.rotation, qkv.weight, wide=qkv.settings is None)
            )
        if pair is not None:
            packed = packed.with_scratch(pair=new_pair_exchange(layer.entries.shape[1], *pair))
        return packed

    def qkv(
        self, h: QuantizedTokens | FewTokens | Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t _"], ...]:
        """Queries, keys and values, one beside the other."""
        return self.qkv_linear.parts(h)

    def gate_up(self, h: QuantizedTokens | FewTokens | Float[Array, "b t d"]) -> Float[Array, "b t hidden"]:
        """`silu(gate(h)) · up(h)`."""
        gate, up = self.gate_up_linear.parts(h)
        return jax.nn.silu(gate) * up

    def finish(
        self, x: Float[Array, "b t d"], mixed: Float[Array, "b t heads_d"] | AttentionSplits
    ) -> Float[Array, "b t d"]:
        """As `Block.finish`; each residual is added where its linear ends."""
        x = self.o(self.o_input(mixed), x)
        h = self.mlp_input(x)
        if isinstance(h, FewTokens):
            return self.down(self.down_input(self.gate_up_linear(h, gated=True)), x)
        if self.down_input.takes_gate:  # both outputs as they lie, without a pass between the two linears
            return self.down(self.down_input(self.gate_up_linear(h), gated=True), x)
        return self.down(self.down_input(self.gate_up(h)), x)


_integer_weight = jax.jit(integer_weight)


def _layer(blocks: Block, index: int) -> Block:
    """One block on the device; of blocks on the host, no more than that one is moved there."""
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(blocks)):
        return _device_layer(blocks, index)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), blocks)


@jax.jit
def _device_layer(blocks: Block, index: jax.Array) -> Block:
    return jax.tree.map(lambda leaf: leaf[index], blocks)


def _table(
    matrix: jax.Array | IntegerTensor, *, dtype, mesh: Mesh | None, columns: bool = False
) -> jax.Array | IntegerWeight:
    """An embedding or LM head: packed integers where kernels take them, else floats, cast once.

    A cast at every step would write out and read again all of it. Floats have a column a token in a head, integers
    always a row.
    """
    if not isinstance(matrix, IntegerTensor):
        return jnp.asarray(matrix, dtype)
    if mesh is None and obstacle(matrix) is None:
        return for_kernels(_integer_weight(matrix))
    floats = jnp.asarray(dequantize(matrix, jnp.float32), dtype)
    return floats.T if columns else floats


def _nothing(x: jax.Array) -> jax.Array:
    """Stands where `Block` has a norm that its input does here."""
    return x
