"""Turns prompts and chats into token ids, by the tokenizer's chat template; BOS is there once or not at all."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from twla_jax.errors import TwlaError

Messages = Sequence[Mapping[str, str]]  # each with `role` and `content`
_ANSWER = "answer"


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text as the tokenizer begins it; a text that begins with BOS itself gets no second one.

    Raises:
      TwlaError: it holds half a surrogate pair, which is no character.
    """
    _require_characters(text)
    ids, bos = list(tokenizer(text)["input_ids"]), tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def encode_chat(tokenizer: Any, messages: Messages, *, answer: bool = True) -> list[int]:
    """Return the ids of a chat as the tokenizer's template writes it, BOS where the template has it.

    Args:
      tokenizer: of the model.
      messages: in order.
      answer: whether the model's answer is to follow.

    Raises:
      TwlaError: there is no template, or it does not take these messages.
    """
    text = render_chat(tokenizer, messages, answer=answer)
    return encode_rendered(tokenizer, text)


def encode_rendered(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of what a chat template wrote: special tokens stand in it already; errors as `encode_text`."""
    _require_characters(text)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _require_characters(text: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise TwlaError("the text holds half a surrogate pair, which is no character")


def render_chat(tokenizer: Any, messages: Messages, *, answer: bool) -> str:
    """Return the text of a chat by the tokenizer's template; arguments and errors are those of `encode_chat`."""
    if not getattr(tokenizer, "chat_template", None):
        raise TwlaError("this model has no chat template; give it a plain prompt")
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer
        )
    except Exception as error:  # whatever a template raises or breaks on
        reason = " ".join(str(error).split())[:200]
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise TwlaError(f"the chat template does not take these messages ({roles}): {reason}") from error


def ends_of_answer(tokenizer: Any, ends: Collection[int]) -> tuple[int, ...]:
    """Return the tokens that end an answer: the model's own, and the special one that the template puts after it."""
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}
    try:
        text = render_chat(tokenizer, [question, answer], answer=False)
    except TwlaError:
        return tuple(ends)
    _, found, rest = text.rpartition(_ANSWER)
    ids = encode_rendered(tokenizer, rest.lstrip())[:1] if found else []
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(dict.fromkeys([*ends, *(special & set(ids))]))
