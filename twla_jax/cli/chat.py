"""Defines the command that talks with a model: `chat`."""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from twla_jax.cli import interrupts
from twla_jax.cli.options import (
    Kernels,
    Model,
    OptionalBits,
    OptionalDtype,
    Seed,
    argument,
    number,
    read_text,
)
from twla_jax.cli.sampling_options import (
    OptionalMinP,
    OptionalRepetitionPenalty,
    OptionalTemperature,
    OptionalTopK,
    OptionalTopP,
    Stop,
    System,
    sampling_of,
    stop_texts,
)
from twla_jax.errors import TwlaError

if TYPE_CHECKING:
    from twla_jax.inference.conversation import Conversation

_HELP = "/reset forgets what was said, /exit ends; Ctrl-C stops an answer"
_PROMPT = "> "


def chat(
    model: Model,
    /,
    *,
    system: System = None,
    max_new_tokens: Annotated[int, number("max_new_tokens")] = 1024,
    temperature: OptionalTemperature = None,
    top_k: OptionalTopK = None,
    top_p: OptionalTopP = None,
    min_p: OptionalMinP = None,
    repetition_penalty: OptionalRepetitionPenalty = None,
    stop: Stop = (),
    seed: Seed = 0,
    activation_bits: OptionalBits = None,
    kernels: Kernels = "auto",
    kv_cache: Annotated[Literal["int8"] | None, argument("int8", optional=True)] = None,
    dtype: OptionalDtype = None,
) -> None:
    """Talk with a model, which keeps the conversation; answers are printed as they are generated.

    Lines are read from the terminal or a pipe. /reset forgets the conversation, /exit or the end of the input ends the
    program, Ctrl-C stops an answer. Messages go through the model's own chat template.

    Args:
        model: folder written by twla, Hugging Face folder, .gguf file, hub id (org/name), or smollm2
        system: system prompt, the first message of the conversation
        max_new_tokens: maximum number of tokens of an answer
        temperature: 0 takes the most likely token, 1 samples from the model's own distribution; default: as the model's
            generation_config.json suggests, else 0.7
        top_k: sample from the K most likely tokens, 0 from all; default: as the model suggests, else 0
        top_p: sample from the most likely tokens that together have this probability; default: as suggested, else 1
        min_p: sample from tokens at least this many times as likely as the most likely; default: as suggested, else 0
        repetition_penalty: above 1 makes tokens that have already occurred less likely; default: as suggested, else 1
        stop: text at which an answer ends; may be given several times
        seed: seed of the sampling
        activation_bits: bits of the linear inputs, 16 leaves them unquantised; default: as saved
        kernels: on packs the weights and runs the device's kernels; off computes as the quantiser does; auto packs
            only where there are kernels, and on a CPU unpacks the weights once, if they fit
        kv_cache: int8 stores keys and values in 8 bits; default: the type the model computes in
        dtype: type the model computes in; default: float32, or bfloat16 with kernels
    """
    from twla_jax.cli.use import load_for_use
    from twla_jax.inference.conversation import Conversation
    from twla_jax.jobs import loading
    from twla_jax.progress import say

    system = None if system is None else read_text(system, "--system")
    suggested = {"temperature": 0.7, **loading.suggested_sampling(model)}
    sampling = sampling_of(
        suggested,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    decoder, tokenizer, path = load_for_use(model, dtype, activation_bits, kernels)
    conversation = Conversation(
        decoder,
        tokenizer,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop_texts(stop),
        cache_dtype=kv_cache,
    )
    say(f"{path}, {decoder.dtype}, temperature {sampling.temperature:g}; {_HELP}")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no text is seen as such by the model, too
    with interrupts.raised():
        talk(conversation, _read_line)


def talk(conversation: "Conversation", read: Callable[[], str | None]) -> None:
    """Answer line after line, on stdout, until the input ends or says /exit.

    Args:
      conversation: answers.
      read: returns the next line, None at the end of the input; raises KeyboardInterrupt at Ctrl-C.
    """
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            print(f"\n({_HELP})", file=sys.stderr)
            continue
        if line is None or line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            conversation.reset()
            print("(forgotten)", file=sys.stderr)
        elif line.lstrip().startswith("/"):
            print(f"({line.split()[0]} is no command; {_HELP})", file=sys.stderr)
        elif line.strip():
            _answer(conversation, line)


def _answer(conversation: "Conversation", line: str) -> None:
    answer = conversation.answer(line)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        print("(stopped)", file=sys.stderr)
    except TwlaError as error:
        print(f"twla: {error}; /reset begins anew", file=sys.stderr)
    finally:
        answer.close()  # pyright: ignore[reportAttributeAccessIssue]


def _read_line() -> str | None:
    """Return the next line, with the keys of a terminal for editing and earlier lines; None at the end of the input."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # from now on, `input` knows these keys
        try:
            return input(_PROMPT)
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
