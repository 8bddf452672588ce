"""Computes the gate `silu(gate) · up` of an MLP, rounded to bf16 after every step as in XLA.

There are two forms. `silu_gate` takes one number and divides; `silu_gate_pairs` takes two numbers in one word and
multiplies by an approximate reciprocal, since it runs on eight features at a time while a token is being loaded. Both
round the sigmoid to bf16. They stay two functions because one of them in both places would change the machine code of
the kernels, and with it their registers.
"""

from collections.abc import Sequence

from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Real, Word


def silu_gate(gate: Real, up: Real) -> Real:
    """Return `silu(gate) · up` as a float32 that is not yet rounded."""
    gate, up = gate.to_bfloat16(), up.to_bfloat16()
    small = threads.exponential(threads.real(0.0) - gate).to_bfloat16()
    sigmoid = (threads.real(1.0) / (small + 1.0).to_bfloat16()).to_bfloat16()
    return (gate * sigmoid).to_bfloat16() * up


def silu_gate_pairs(gates: Sequence[Word], ups: Sequence[Word]) -> list[Word]:
    """Return `silu(gate) · up` of words that hold two bf16 numbers each, in as many words."""
    found = []
    for gate, up in zip(gates, ups, strict=True):
        powers = [threads.exponential(threads.real(0.0) - each) for each in threads.unpack_bfloat16(gate)]
        divisors = [each + 1.0 for each in threads.unpack_bfloat16(threads.pack_bfloat16(*powers))]
        divisors = threads.unpack_bfloat16(threads.pack_bfloat16(*divisors))
        sigmoid = threads.pack_bfloat16(*map(threads.reciprocal, divisors))
        found.append(threads.multiply_bfloat16(threads.multiply_bfloat16(gate, sigmoid), up))
    return found
