"""The commands that use models, quantised or not: `eval`, `generate`, `inspect`."""

import sys
from typing import Annotated, Any, Literal

from twla_jax.cli.options import Dtype, Kernels, Model, OptionalBits, OptionalInt, Out, argument, show
from twla_jax.errors import TwlaError
from twla_jax.inference import generation
from twla_jax.jobs import loading
from twla_jax.models import config, sites


def evaluate(
    model: Model,
    /,
    *,
    corpus: Annotated[str, argument("CORPUS|FILE")] = "pydoc",
    seq_len: Annotated[int, argument("N")] = 2048,
    max_windows: OptionalInt = None,
    activation_bits: OptionalBits = None,
    batch_size: Annotated[int, argument("N")] = 1,
    kernels: Kernels = "off",
    dtype: Dtype | None = None,
    json: bool = False,
) -> None:
    """Perplexity of a model, quantised or not, on the evaluation text of a corpus.

    By default in the quantiser's own arithmetic, whose figures are those of the README on any device.

    Args:
        model: folder that twla wrote, Hugging Face folder, .gguf file, or smollm2
        corpus: pydoc, wikitext2, c4, or a .txt or .jsonl file or folder
        seq_len: tokens in a window; windows do not overlap
        max_windows: score only the first so many
        activation_bits: quantise linear inputs to so many bits, 16 for none; as saved if not given
        batch_size: windows at a time
        kernels: on, packed and through the device's kernels; off, as quantised; auto, packed where there are kernels
        dtype: what the model computes in; float32 if not given, bfloat16 in kernels
        json: print the figures as JSON
    """
    from twla_jax.evaluation import scoring
    from twla_jax.text import corpora

    text = corpora.load_corpus(corpus, "evaluation")
    decoder, tokenizer, path = _load(model, dtype, activation_bits, kernels)
    tokens = corpora.tokenize(text, tokenizer, decoder.config.vocab_size)
    config.check_length(seq_len, decoder.config)
    result = scoring.evaluate(
        decoder, tokens, seq_len=seq_len, max_windows=max_windows, batch_size=batch_size
    )
    result = {**result, "corpus": text.describe(), "dtype": str(decoder.dtype), "path": path}
    result["activation_bits"] = activation_bits
    show(
        result,
        json,
        lambda: (
            f"perplexity {result['perplexity']:.3f}  ({result['tokens']} tokens, {result['windows']} windows; "
            f"{path}, {result['dtype']})"
        ),
    )


def generate(
    model: Model,
    /,
    *,
    prompt: Annotated[str, argument("TEXT")],
    max_new_tokens: Annotated[int, argument("N")] = 64,
    temperature: Annotated[float, argument("T")] = 0.0,
    samples: Annotated[int, argument("N")] = 1,
    seed: Annotated[int, argument("N")] = 0,
    activation_bits: OptionalBits = None,
    kernels: Kernels = "auto",
    kv_cache: Literal["int8"] | None = None,
    dtype: Dtype | None = None,
    json: bool = False,
) -> None:
    """Continue a prompt, printing text as it comes; of several samples, when all are done.

    Args:
        model: folder that twla wrote, Hugging Face folder, .gguf file, or smollm2
        prompt: text to continue
        max_new_tokens: tokens to add at most
        temperature: 0 takes the likeliest token, 1 samples as the model says
        samples: continuations to make side by side
        seed: of the sampling
        activation_bits: quantise linear inputs to so many bits, 16 for none; as saved if not given
        kernels: on, packed and through the device's kernels; off, as quantised; auto, packed where there are kernels
        kv_cache: int8 keeps keys and values in half the bytes of bfloat16; what the model computes in if not given
        dtype: what the model computes in; float32 if not given, bfloat16 in kernels
        json: print prompt, text and token ids as JSON, at the end
    """

    if samples > 1 and temperature == 0:
        raise TwlaError(f"--samples {samples}: all would be the same; set --temperature")
    decoder, tokenizer, path = _load(model, dtype, activation_bits, kernels)
    print(f"twla: {path}, {decoder.dtype}", file=sys.stderr)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings["cache_dtype"] = kv_cache
    figures: dict[str, Any] = {"prompt": prompt, "path": path, "dtype": str(decoder.dtype)}
    if samples != 1:
        texts, ids = generation.sample_texts(decoder, tokenizer, prompt, samples=samples, **settings)
        show({**figures, "texts": texts, "tokens": ids}, json, lambda: "\n---\n".join(texts))
        return
    ids, pieces = [], []
    for token, piece in generation.stream_text(decoder, tokenizer, prompt, **settings):
        ids.append(token)
        pieces.append(piece)
        if not json:
            print(piece, end="", flush=True)
    show({**figures, "text": "".join(pieces), "tokens": ids}, json, lambda: "")


def inspect(out: Out, /, *, json: bool = False) -> None:
    """Bits and bytes of a quantised model, counted from what is stored.

    Args:
        out: folder that twla wrote
        json: print the figures as JSON
    """
    from twla_jax.storage import accounting

    account = accounting.account(out)
    show(account, json, lambda: accounting.format_account(account))


def _load(
    model: str, dtype: str | None, activation_bits: int | None, kernels: Kernels
) -> tuple[Any, Any, str]:
    """The model in the form asked for, its tokenizer, and what runs it."""
    import jax.numpy as jnp

    from twla_jax.inference import execution

    decoder, tokenizer = loading.load(model, dtype=None if dtype is None else jnp.dtype(dtype))
    if tokenizer is None:
        raise TwlaError(f"{model}: has no tokenizer")
    if activation_bits is not None:
        decoder = sites.set_activation_bits(decoder, activation_bits)
    decoder, path = execution.for_inference(decoder, kernels, dtype=dtype)
    return decoder, tokenizer, path
