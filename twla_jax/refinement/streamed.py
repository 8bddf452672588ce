"""Refines by the gradient of the whole model in the memory of a few blocks.

Forward, only the input of every block is kept. Backward, a block is computed again, its gradient is taken, its latents
are updated at once, and the gradient is let go: of no two blocks do gradients, or float weights, exist together. The
teacher runs in the same pass. Latents may be bfloat16, rounded up or down by chance so that small updates add up, with
a second moment that is factored into rows and columns (Shazeer & Stern, arXiv 1804.04235), and may lie on the host.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from twla_jax.models.blocks import ChainBlock, Context
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace
from twla_jax.refinement.divergence import kl_of_hidden
from twla_jax.refinement.latents import Latents, apply, harden_arrays, init_latents
from twla_jax.refinement.schedule import optimizer
from twla_jax.refinement_settings import EndToEndSettings
from twla_jax.storage import resume

_FINAL = "norm"  # the one norm that belongs to no block


class StreamedTraining:
    """Trains a student's blocks one after the other, each step from the last block to the first.

    What it trains, `values`, is a list of one block's latents and optimiser state each, and last the final norm's.
    """

    def __init__(self, student: Decoder, teacher: Decoder, settings: EndToEndSettings):
        """Make the latents, a block at a time.

        Args:
          student: quantised, on the device.
          teacher: the model it was quantised from, on the device.
          settings: `latents`, `offload`, `activation_bits` and the rates are read.
        """
        self._student, self._teacher, self._settings = student, teacher, settings
        self._static = {
            "bits": settings.activation_bits,
            "learns_rotations": settings.rotation_rate > 0,
            "narrow": settings.latents == "bfloat16",
            "dtype": settings.dtype,
        }
        self._host = _host_memory() if settings.offload else None
        starts, starts_of_stack = jax.jit(self._start), jax.jit(lambda stack: self._start(_only(stack)))
        self.values: list[Any] = []
        final: Latents = {}
        for index in range(student.config.num_layers):
            latents = init_latents(*_one_block(student, teacher, index=index), codes=settings.code_rate > 0)
            final = {_FINAL: latents.pop(_FINAL)}
            self.values.append(self._put(starts_of_stack(latents)))
        self.values.append(starts(final))

    def step(self, tokens: Int32[np.ndarray, "b t"], rates: dict[str, float], number: int) -> jax.Array:
        """Return the loss on a batch, a float32 scalar, and change `values` by a step along its slope.

        Args:
          tokens: the batch.
          rates: the learning rates of this step.
          number: of the step, which its rounding by chance depends on.
        """
        student, teacher, static = self._student, self._teacher, self._static
        context = student.context(tokens.shape[1])
        inputs, x, exact = self._forward(jnp.asarray(tokens), context)
        key = jax.random.fold_in(jax.random.key(0), number)
        loss, slope, self.values[-1] = _learn_head(
            student, teacher, self.values[-1], x, exact, jnp.asarray(tokens), rates, **static
        )
        for index in reversed(range(len(inputs))):
            arguments = (student.blocks, self._get(self.values[index]), inputs.pop(), slope, context)
            key, here = jax.random.split(key)
            updated, slope = _learn_block(*arguments, jnp.int32(index), rates, here, **static)
            self.values[index] = self._put(updated)
        return loss

    def restore(self, saved: dict[str, np.ndarray]) -> None:
        """Take what an interrupted run kept of `values`, which are spent: there may be no room for both."""
        resume.discard(self.values)
        self.values = resume.unflatten(self.values, saved)

    def loss(self, tokens: Int32[np.ndarray, "b t"]) -> jax.Array:
        """Return the loss on a batch, a float32 scalar; nothing learns."""
        placed = jnp.asarray(tokens)
        _, x, exact = self._forward(placed, self._student.context(tokens.shape[1]))
        return _head_loss(self._student, self._teacher, self.values[-1][0], x, exact, placed)

    def harden(self) -> Decoder:
        """Return the student, on the host, with what the latents stand for in its own format."""
        student, bits = self._student, self._settings.activation_bits
        final = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self.values[-1][0])
        blocks, norm = [], student.norm
        for index in range(student.config.num_layers):
            latents = _stack_of_one(self._get(self.values[index])[0])
            (one,) = _one_block(student, index=index)
            hard = harden_arrays(one, {**latents, **final}, bits)
            blocks.append(jax.tree.map(np.asarray, hard.blocks))
            norm = hard.norm
        stacked = jax.tree.map(lambda *each: np.concatenate(each), *blocks)
        return jax.tree.map(np.asarray, replace(student, blocks=stacked, norm=norm))

    def _forward(self, tokens, context: Context) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """Return the input of every block, and the residual streams of student and teacher after all."""
        student, teacher = self._student, self._teacher
        x, exact = student.embed_tokens(tokens), teacher.embed_tokens(tokens)
        inputs = []
        for index in range(student.config.num_layers):
            inputs.append(x)
            arguments = (student.blocks, teacher.blocks, self._get(self.values[index])[0], x, exact, context)
            x, exact = _forward_block(*arguments, jnp.int32(index), bits=self._static["bits"])
        return inputs, x, exact

    def _start(self, latents: Latents) -> tuple[Latents, Any]:
        rates = self._settings.peak_rates
        tree = optimizer(rates, self._static["learns_rotations"], narrow=self._static["narrow"]).init(latents)
        return _stored(latents, self._static["narrow"], None), tree

    def _put(self, values: Any) -> Any:
        return values if self._host is None else jax.device_put(values, self._host)

    def _get(self, values: Any) -> Any:
        return values if self._host is None else jax.device_put(values, _device_memory())


@functools.partial(jax.jit, static_argnames="bits", donate_argnames="exact")
def _forward_block(blocks, originals, latents, x, exact, context, index, *, bits):
    """Return both streams after block `index`."""
    block, original = (jax.tree.map(lambda leaf: leaf[index], stack) for stack in (blocks, originals))
    here = context.layer(index)
    return apply(block, _wide(latents), bits, _tokens(x))(x, here), original(exact, here)


@functools.partial(
    jax.jit,
    static_argnames=("bits", "learns_rotations", "narrow", "dtype"),
    donate_argnames=("values", "slope"),
)
def _learn_block(
    blocks, values, x, slope, context, index, rates, key, *, bits, learns_rotations, narrow, dtype
):
    """Return a block's latents and state after a step, and the loss's slope by the block's input."""
    block: ChainBlock = jax.tree.map(lambda leaf: leaf[index], blocks)
    latents = _wide(values[0])
    here = context.layer(index)
    _, pull = jax.vjp(lambda latents, x: apply(block, latents, bits, _tokens(x))(x, here), latents, x)
    gradient, slope = pull(slope)
    return _updated(latents, values[1], gradient, rates, key, learns_rotations, narrow, dtype), slope


@functools.partial(
    jax.jit,
    static_argnames=("bits", "learns_rotations", "narrow", "dtype"),
    donate_argnames=("values", "exact"),
)
def _learn_head(student, teacher, values, x, exact, tokens, rates, *, bits, learns_rotations, narrow, dtype):
    """Return the loss, its slope by the last block's output, and the final norm's latents and state after a step."""
    latents = values[0]
    loss, (gradient, slope) = jax.value_and_grad(_head_loss, argnums=(2, 3))(
        student, teacher, latents, x, exact, tokens
    )
    return loss, slope, _updated(latents, values[1], gradient, rates, None, learns_rotations, narrow, dtype)


@jax.jit
def _head_loss(
    student: Decoder, teacher: Decoder, final: Latents, x: jax.Array, exact: jax.Array, tokens: jax.Array
) -> Float[Array, ""]:
    got = student.norm(x)
    got = got * (1 + final[_FINAL]["g"]).astype(got.dtype)
    return kl_of_hidden(student, teacher, got, teacher.norm(exact), tokens.size)


def _updated(latents, state, gradient, rates, key, learns_rotations: bool, narrow: bool, dtype: str):
    updates, state = optimizer(rates, learns_rotations, narrow=narrow, dtype=dtype).update(
        gradient, state, latents
    )
    return _stored(optax.apply_updates(latents, updates), narrow, key), state


def _tokens(x: Float[Array, "b t d"]) -> int:
    return x.shape[0] * x.shape[1]


def _wide(latents: Latents) -> Latents:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), latents)


def _stored(latents: Any, narrow: bool, key: jax.Array | None) -> Latents:
    """Return latents as they are kept: those of codes as bfloat16 if `narrow`, by chance where there is a key."""
    if not narrow:
        return latents
    keep = {}
    for number, (name, parts) in enumerate(sorted(latents.items())):
        keep[name] = dict(parts)
        if "u" in parts:
            here = None if key is None else jax.random.fold_in(key, number)
            keep[name]["u"] = round_by_chance(parts["u"], here)
    return keep


def round_by_chance(x: Float[Array, "*shape"], key: jax.Array | None) -> Float[Array, "*shape"]:
    """Return x as bfloat16, rounded up as often as it is near the number above, so that its mean stays x.

    Args:
      x: float32, finite.
      key: of the chance; None rounds to nearest.
    """
    if key is None:
        return x.astype(jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _one_block(*models: Decoder, index: int) -> list[Decoder]:
    """Return models of block `index` alone."""
    return [replace(model, blocks=_layer(model.blocks, index)) for model in models]


# One program for all arrays of a model, not one for every shape.
@jax.jit
def _layer(stacks: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1), stacks)


@jax.jit
def _stack_of_one(latents: Latents) -> Latents:
    return jax.tree.map(lambda leaf: leaf[None], _wide(latents))


def _only(stacks: Latents) -> Latents:
    return jax.tree.map(lambda leaf: leaf[0], stacks)


def _device_memory() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _host_memory() -> jax.sharding.Sharding | None:
    """Return the host's memory that the device copies from fastest; None where the device has none."""
    device = jax.devices()[0]
    if device.platform == "cpu" or "pinned_host" not in {each.kind for each in device.addressable_memories()}:
        return None
    return jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
