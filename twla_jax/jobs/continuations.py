"""Sets what a quantised model writes beside what its original writes."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from twla_jax.inference import text_generation
from twla_jax.inference.sampling import Sampling
from twla_jax.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WIDTH = 100
_INDENT = 4


def continue_prompt(
    models: Mapping[str, Decoder],
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Continue a prompt by every model, once with its likeliest tokens and once sampled.

    Args:
      models: by the name that each is shown under; all read the same tokenizer's tokens.
      tokenizer: of the models.
      prompt: text to continue.
      max_new_tokens: tokens to add at most.
      temperature: of the sampled one.
      seed: of the sampled one.
    Returns:
      A row a continuation: `model`, `temperature` and `text`, without the prompt.
    """
    rows = []
    for each in (0.0, temperature):
        for name, model in models.items():
            sampling = Sampling(temperature=each, seed=seed)
            pieces = text_generation.stream_text(
                model, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling
            )
            rows.append({"model": name, "temperature": each, "text": "".join(piece for _, piece in pieces)})
    return rows


def format_continuations(prompt: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the continuations as text for a person, those of one temperature beneath each other."""
    lines = [f'"{prompt} …"']
    last = None
    for row in rows:
        if row["temperature"] != last:
            last = row["temperature"]
            how = "the likeliest tokens" if last == 0 else f"sampled at temperature {last:g}"
            lines += ["", f"{how}:"]
        text = " ".join(row["text"].split())
        indent = " " * _INDENT
        lines.append(f"  {row['model']}")
        lines += textwrap.wrap(f"… {text}", _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)
