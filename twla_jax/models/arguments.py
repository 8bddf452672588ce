"""Checks what callers give as models, tokens and settings, before anything is computed from them."""

from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, Int32

from twla_jax.core.grouped_tensor import GroupedTensor
from twla_jax.core.tensors import IntegerTensor, TernaryTensor
from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig, check_length, check_vocabulary

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts",
)


def checked_tokens(
    tokens: Any, config: DecoderConfig, name: str, *, ranks: tuple[int, ...] = (2,), fits: bool = True
) -> Int32[np.ndarray, "..."]:
    """Return token ids as int32, where nothing is lost by that; a subclass of arrays stays one.

    A lookup would take the last row for an id outside the vocabulary, and a cast cuts fractions and high bits off, both
    without a word.

    Args:
      tokens: what a caller gave.
      config: settings of the model that reads them.
      name: what a message calls them.
      ranks: how many axes they may have.
      fits: whether rows, where there are two axes, must be no longer than what the model reads.

    Raises:
      TwlaError: they are text, no whole numbers, none at all, of another rank, outside the vocabulary, or too long.
    """
    if isinstance(tokens, str | bytes):
        raise TwlaError(f"{name}: is text, not token ids; take tokenizer(text)['input_ids']")
    try:
        ids = np.asanyarray(tokens)
    except ValueError:
        raise TwlaError(f"{name}: rows of token ids must have one length") from None
    if ids.ndim not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise TwlaError(f"{name}: token ids of shape {ids.shape}, but {wanted} axes are wanted")
    if not ids.size:
        raise TwlaError(f"{name}: no token at all")
    if ids.dtype.kind not in "iu":
        raise TwlaError(f"{name}: token ids are whole numbers, not {ids.dtype}")
    check_vocabulary(ids, config.vocab_size)
    if fits and ids.ndim == 2:
        check_length(ids.shape[1], config)
    return ids.astype(np.int32)


def checked_values(tokens: Any, config: DecoderConfig) -> Int[Array, "b t"]:
    """Return the token ids `[b, t]` that a model is called with; those that have values by now are checked.

    Args:
      tokens: an array, on the device, on the host or traced. Of one that is spread over hosts, none has all values.
      config: settings of the model.

    Raises:
      TwlaError: as `checked_tokens`; rows may be longer than what the model was made for.
    """
    traced = isinstance(tokens, Tracer)
    if not traced and not (isinstance(tokens, jax.Array) and not tokens.is_fully_addressable):
        checked = checked_tokens(tokens, config, "tokens", fits=False)
        return tokens if isinstance(tokens, jax.Array) else jnp.asarray(checked)
    return tokens


def require_model(model: Any, name: str = "model") -> None:
    """Refuse anything but a model.

    Raises:
      TwlaError: it is something else, as a path or the pair that `load` returns.
    """
    if not isinstance(getattr(model, "config", None), DecoderConfig):
        hint = "; take the first of the pair that load returns" if isinstance(model, tuple) else ""
        hint = "; load(path) reads one" if isinstance(model, str) else hint
        raise TwlaError(f"{name}: is a {type(model).__name__}, not a model{hint}")


def require_full_precision(model: Any) -> None:
    """Refuse anything but a model that was not quantised.

    Raises:
      TwlaError: it is quantised, or no model.
    """
    require_model(model)

    def is_code(leaf):
        return isinstance(leaf, TernaryTensor | IntegerTensor | GroupedTensor)

    if any(map(is_code, jax.tree.leaves(model, is_leaf=is_code))):
        raise TwlaError("model: is quantised already; quantising begins with the original")


def require_pair(student: Any, teacher: Any) -> None:
    """Refuse two models of which one cannot learn from the other.

    Raises:
      TwlaError: one is no model, or their sizes differ.
    """
    require_model(student, "student")
    require_model(teacher, "teacher")
    for size in _SIZES:
        ours, theirs = getattr(student.config, size), getattr(teacher.config, size)
        if ours != theirs:
            raise TwlaError(
                f"teacher: is another model than the student; their {size} is {theirs} and {ours}"
            )


def require_settings(settings: Any, kind: type, name: str) -> None:
    """Refuse settings of another kind.

    Raises:
      TwlaError: they are something else, as the name of a recipe.
    """
    if not isinstance(settings, kind):
        hint = "; load_recipe(name) reads one" if isinstance(settings, str | PathLike) else ""
        raise TwlaError(f"{name}: is a {type(settings).__name__}, not a {kind.__name__}{hint}")
