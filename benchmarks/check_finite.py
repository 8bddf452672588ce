"""Checks that what is not finite ends generation, through the kernels of the device at hand.

    python benchmarks/check_finite.py

A kernel may lose NaN or infinity: GPUs' minimum and maximum pass over NaN, and a quantised token has no code for it.
Then a token would be made of it. Of a batch of prompts, one holds a token whose embedding is infinite or NaN: its row
has to be refused, and the other rows' tokens to be those of the model without it.
"""

import jax.numpy as jnp
import numpy as np

from twla_jax import xla_flags
from twla_jax.bench import SHAPES, shapes
from twla_jax.errors import TwlaError
from twla_jax.inference import generation
from twla_jax.inference.request import checked_request
from twla_jax.models.layers import replace

BAD = 7  # the token
NEW = 8


def first_tokens(model, prompts: np.ndarray) -> np.ndarray:
    """Return the token after every prompt, −1 where it is refused, `[b]`."""
    request = checked_request(model, prompts, NEW, eos_token_ids=())
    token, _, _ = generation.fill(request, model.init_cache(len(prompts), 64), held=0)
    return np.asarray(token)


def check(bits: int | None, value: float, rows: int) -> str:
    """Return what came of a batch of `rows`, in one word or a few."""
    model = shapes.random_decoder(SHAPES["tiny"], activation_bits=bits, embedding_bits=16)
    table = jnp.asarray(model.embed.get_value())
    if model.head is None:
        return "the head is tied: nothing to see"
    broken = replace(model, embed=table.at[BAD].set(value))
    prompts = np.random.default_rng(0).integers(BAD + 1, SHAPES["tiny"].vocab_size, (rows, 6))
    expected = first_tokens(model, prompts)
    prompts[0, 3] = BAD
    found = first_tokens(broken, prompts)
    if found[0] >= 0:
        return f"WRONG: token {found[0]} was made of it"
    if (found[1:] != expected[1:]).any():
        return f"WRONG: {int((found[1:] != expected[1:]).sum())} other rows changed"
    try:  # and by a step: the bad token comes last in the prompt
        generation.generate(broken, np.full((1, 1), BAD), max_new_tokens=NEW, eos_token_ids=())
    except TwlaError:
        return "refused"
    return "WRONG: generated on"


def main() -> None:
    """Print a row for every form of the linears, kind of value and number of rows."""
    xla_flags.disable_triton_gemm()
    for bits in (None, 16, 8, 4):
        for value in (np.inf, np.nan):
            for rows in (1, 3, 16):
                name = "bf16" if bits is None else f"W1.58A{bits}"
                print(f"{name:10}{value:6}{rows:4} rows: {check(bits, value, rows)}", flush=True)


if __name__ == "__main__":
    main()
