"""Runs a decoder fast: kernel-ready weights, one product an input, integers where it can.

Each input of a block goes once through `rotate_quantize`, and the linears that read it are one `ternary_matmul`; for a
token or a few both are one `quantized_linear`. Where an input's activations are not quantised, they are only rotated,
and meet the same packed weights in bf16. A model that is not quantised gets the same form, with one dense product an
input, and so does one whose weights are unpacked. An embedding and an LM head of integers stay packed, too:
`integer_matmul` makes the logits.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from twla_jax.core.grouped_tensor import GroupedTensor
from twla_jax.core.tensors import IntegerTensor, dequantize
from twla_jax.devices import on_device, warn_if_triton_gemm
from twla_jax.errors import TwlaError
from twla_jax.inference import tensor_parallel
from twla_jax.inference.packed_block import PackedBlock, packed_block
from twla_jax.inference.packed_cache import PackedCache
from twla_jax.inference.packed_linear import for_kernels
from twla_jax.inference.unpacked import add_words, head_words, runs_unpacked, unpack_block
from twla_jax.models.blocks import ChainBlock, Context
from twla_jax.models.decoder import Decoder, can_fuse
from twla_jax.models.layers import replace
from twla_jax.models.sharding import shardings
from twla_jax.ops.attention.kv_cache import KVCache, empty_layer
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.integer_matmul import IntegerWeight, integer_matmul, integer_rows, integer_weight, obstacle
from twla_jax.ops.word_product import WordWeight, word_product


def prepare_for_inference(
    model: Decoder,
    *,
    mesh: Mesh | None = None,
    implementation: Implementation | None = None,
    unpack: bool | None = None,
) -> Decoder:
    """Return the same model in its fastest form: weights in the kernels' layout, and float ones in its `dtype`.

    Whether an input is quantised is fixed from here on, not at how many bits. It is for inference alone: it has no
    gradient, and is not saved.

    Args:
      model: as arrays, not tracers.
      mesh: with an axis `model`, over which the rows of every linear go, and usually `data`, over which batches go;
        None for one device.
      implementation: as `ternary_matmul` and `rotate_quantize` take it.
      unpack: whether quantised weights become floats once and for all, in place of the kernels' layout, which without
        kernels is unpacked for every token; None does so on a CPU where they take no more than half of its memory, and
        no `implementation` or mesh is named.

    Raises:
      TwlaError: its weights are integers, or of a group size that the kernels have no place for; `unpack` on a mesh.
    """
    warn_if_triton_gemm()
    unpack = (mesh is None and implementation is None and runs_unpacked(model)) if unpack is None else unpack
    if unpack:
        if mesh is not None:
            raise TwlaError("weights are unpacked on one device only; leave out the mesh")
        return PackedDecoder(model, mesh=None, implementation=implementation, unpack=True)
    if isinstance(model.first_kernel, GroupedTensor):
        raise TwlaError("there are no kernels for the published layout; run it without preparing it")
    if isinstance(model.first_kernel, IntegerTensor):
        raise TwlaError("there are no kernels for integer weights, only for ternary and float ones")
    if mesh is not None:
        model = jax.device_put(model, shardings(model, mesh))
    return PackedDecoder(model, mesh=mesh, implementation=implementation)


class PackedDecoder(Decoder):
    """A `Decoder` with a list of `PackedBlock`s, run one after the other: a scan would copy each layer's weights.

    Attributes:
      head_words: the head's integers as a single token reads them, in place of floats; None where there are none.
    """

    head_words: nnx.Param[WordWeight] | None

    def __init__(
        self,
        model: Decoder,
        *,
        mesh: Mesh | None,
        implementation: Implementation | None,
        unpack: bool = False,
    ):
        self.config, self.mesh = model.config, mesh
        self.dtype = model.dtype
        self.fused = model.fused or (
            mesh is None and implementation in (None, "gpu") and can_fuse(model.config, model.dtype)
        )
        self.implementation: Implementation | None = implementation
        self.norm = model.norm
        table = functools.partial(_table, dtype=model.dtype, packed=not unpack, mesh=mesh)
        self.embed = nnx.Param(table(model.embed.get_value()))
        self.head = model.head
        if model.head is not None:
            self.head = replace(model.head, kernel=table(model.head.kernel.get_value(), columns=True))
        kernel = model.embed.get_value() if model.head is None else model.head.kernel.get_value()
        in_words = unpack and jax.default_backend() == "cpu"
        words = head_words(kernel) if in_words else None
        self.head_words = nnx.data(None if words is None else nnx.Param(words))
        options = {"dtype": model.dtype, "mesh": mesh, "implementation": implementation}
        blocks = []
        for layer in (_layer(model.blocks, i) for i in range(model.config.num_layers)):
            block = packed_block(unpack_block(layer, model.dtype) if unpack else layer, **options)
            if in_words:
                add_words(block, layer)
            blocks.append(block)
        self.blocks = nnx.List(blocks)  # pyright: ignore[reportAttributeAccessIssue]

    def embed_tokens(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Return the first block's input, in `dtype`, whole on every device of a mesh."""
        x = super().embed_tokens(tokens)
        return x if self.mesh is None else tensor_parallel.whole(x, self.mesh)

    def embedding_rows(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Return the embeddings of ids within the vocabulary, in `dtype`; of packed rows, only these are unpacked."""
        table = self.embed.get_value()
        if self.mesh is not None:
            return tensor_parallel.rows(table, tokens, self.dtype, self.mesh)
        if isinstance(table, IntegerWeight):
            return integer_rows(table, tokens, self.dtype)
        return super().embedding_rows(tokens)

    def last_norm(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the last block's output after the final norm; on a mesh, it is gathered for the head before that."""
        return super().last_norm(x if self.mesh is None else tensor_parallel.whole(x, self.mesh))

    def logits(self, h: Float[Array, "*tokens d"]) -> Float[Array, "*tokens vocab"]:
        """Return logits from `hidden`'s output, accumulated and returned in float32."""
        if self.head_words is not None and h.size == h.shape[-1]:
            return self.cap_logits(word_product(h, self.head_words.get_value()))
        kernel = self.embed.get_value() if self.head is None else self.head.kernel.get_value()
        if isinstance(kernel, IntegerWeight):
            options = {"out_dtype": jnp.float32, "implementation": self.implementation}
            op = functools.partial(integer_matmul, **options)
            if self.mesh is None:
                return self.cap_logits(op(h, kernel))
            rows = h.reshape(len(h), -1, h.shape[-1])
            y = tensor_parallel.matmul(op, rows, kernel, self.mesh)
            return self.cap_logits(y.reshape(*h.shape[:-1], -1))
        return super().logits(h)

    @property
    def layers(self) -> tuple[PackedBlock, ...]:
        """Returns the blocks, one by one."""
        return tuple(self.blocks)  # pyright: ignore[reportArgumentType]

    def through_blocks[T](
        self,
        step: Callable[[T, ChainBlock, Context, jax.Array | int], T],
        carry: T,
        context: Context,
    ) -> T:
        """Return the carry after `step(carry, block, context, index)` of every block, in order."""
        for index, block in enumerate(self.layers):
            carry = step(carry, block, context.layer(index), index)
        return carry

    def init_cache(self, batch: int, size: int, dtype: DTypeLike | None = None) -> KVCache:
        """Return an empty cache for `size` positions, layer by layer, in `dtype`: see `Decoder.init_cache`."""
        shape = self._cache_shape(batch, size)
        layers = tuple(block.with_scratch(empty_layer(shape, dtype or self.dtype)) for block in self.layers)
        stores, scratch = tuple(layer.stores for layer in layers), tuple(layer.scratch for layer in layers)
        cache = PackedCache(layers=stores, scratch=scratch, length=jnp.int32(0))
        return cache if self.mesh is None else tensor_parallel.place_cache(cache, self.mesh)


_integer_weight = jax.jit(integer_weight)


def _layer(blocks: ChainBlock, index: int) -> ChainBlock:
    """Return one block on the device; of blocks on the host, no more than that one is moved there."""
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(blocks)):
        return _device_layer(blocks, index)
    return on_device(jax.tree.map(lambda leaf: leaf[index], blocks))


@jax.jit
def _device_layer(blocks: ChainBlock, index: jax.Array) -> ChainBlock:
    return jax.tree.map(lambda leaf: leaf[index], blocks)


def _table(
    matrix: jax.Array | IntegerTensor, *, dtype, packed: bool, mesh: Mesh | None, columns: bool = False
) -> jax.Array | IntegerWeight:
    """Return an embedding or LM head: integers as kernels take them, if `packed` and they do; else floats, cast once.

    A cast at every step would write out and read again all of it. Floats have a column a token in a head, integers
    always a row.
    """
    if not isinstance(matrix, IntegerTensor):
        return jnp.asarray(matrix, dtype)
    if packed and obstacle(matrix) is None:
        pack = (
            _integer_weight if mesh is None else functools.partial(tensor_parallel.sharded_table, mesh=mesh)
        )
        return for_kernels(pack(matrix))
    floats = jnp.asarray(dequantize(matrix, jnp.float32), dtype)
    return floats.T if columns else floats
