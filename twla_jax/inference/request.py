"""Checks what is asked of generation, before anything is computed."""

import operator
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int32

from twla_jax.devices import on_device
from twla_jax.errors import TwlaError
from twla_jax.inference.sampling import Sampler, Sampling
from twla_jax.limits import check_number
from twla_jax.models.arguments import checked_tokens, require_model, require_settings
from twla_jax.models.decoder import Decoder


class Request(NamedTuple):
    """Holds what is to be generated: the arguments of `generation.stream`, checked and as arrays."""

    model: Decoder
    prompt: Int32[np.ndarray, "b t"]
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    sampler: Sampler
    seen: Bool[np.ndarray, "b vocab"] | None
    key: jax.Array
    ends: Int32[np.ndarray, " ends"]


def checked_request(
    model: Decoder,
    prompt: Any,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    temperature: float | None = None,
    key: jax.Array | None = None,
    eos_token_ids: Collection[int] | None = None,
) -> Request:
    """Return the arguments of `generation.stream` as arrays, if they are usable; raises as it does."""
    require_model(model)
    prompt = checked_tokens(prompt, model.config, "prompt", fits=False)
    length = prompt.shape[1]
    check_number("max_new_tokens", max_new_tokens)
    if temperature is not None:
        check_number("temperature", temperature)
        if sampling is not None:
            raise TwlaError("temperature: is a part of sampling; give one of the two")
        sampling = Sampling(temperature=temperature)
    sampling = Sampling() if sampling is None else sampling
    require_settings(sampling, Sampling, "sampling")
    if (total := length + max_new_tokens) > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise TwlaError(
            f"max_new_tokens {max_new_tokens}: with {length} prompt tokens {total}, above the model's {limit}"
        )
    ends = model.config.eos_token_ids if eos_token_ids is None else eos_token_ids
    try:
        ends = np.asarray([operator.index(each) for each in ends], np.int32)
    except (TypeError, OverflowError):
        raise TwlaError(f"eos_token_ids {ends!r}: must be token ids") from None
    return Request(
        model=on_device(model),  # once, not at every step
        prompt=prompt,
        count=max_new_tokens,
        sampler=sampling.sampler(),
        seen=sampling.seen(prompt, model.config.vocab_size),
        key=jax.random.key(sampling.seed) if key is None else key,
        ends=ends,
    )
