"""Defines the commands that use a model, quantised or not: `generate`, `inspect`."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from twla_jax.cli.options import (
    Kernels,
    Model,
    OptionalBits,
    OptionalDtype,
    OptionalMesh,
    OptionalText,
    Seed,
    argument,
    mesh_of,
    number,
    read_text,
    show,
)
from twla_jax.cli.sampling_options import (
    MinP,
    RepetitionPenalty,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    sampling_of,
    stop_texts,
)
from twla_jax.errors import TwlaError

if TYPE_CHECKING:  # which imports JAX
    from jax.sharding import Mesh


def generate(
    model: Model,
    text: tyro.conf.Positional[OptionalText] = None,
    /,
    *,
    prompt: OptionalText = None,
    chat: bool = False,
    system: System = None,
    max_new_tokens: Annotated[int, number("max_new_tokens")] = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = (),
    samples: Annotated[int, number("samples")] = 1,
    seed: Seed = 0,
    activation_bits: OptionalBits = None,
    kernels: Kernels = "auto",
    kv_cache: Annotated[Literal["int8"] | None, argument("int8", optional=True)] = None,
    mesh: OptionalMesh = None,
    dtype: OptionalDtype = None,
    json: bool = False,
) -> None:
    """Continue a prompt and print the text as it is generated; several samples are printed when all are done.

    With --chat the prompt is a user's message, which the model answers; `twla chat` keeps a conversation going.

    Args:
        model: folder written by twla, Hugging Face folder, .gguf file, hub id (org/name), or smollm2
        text: prompt to continue
        prompt: the same as TEXT, for prompts that begin with a dash
        chat: treat the prompt as a user's message and put it through the model's chat template
        system: system prompt before that message; needs --chat
        max_new_tokens: maximum number of tokens to add
        temperature: 0 takes the most likely token, 1 samples from the model's own distribution
        top_k: sample from the K most likely tokens; 0 from all
        top_p: sample from the most likely tokens that together have this probability
        min_p: sample from tokens at least this many times as likely as the most likely
        repetition_penalty: above 1 makes tokens that have already occurred less likely; 1 changes nothing
        stop: text at which the continuation ends; may be given several times
        samples: number of continuations to generate together
        seed: seed of the sampling
        activation_bits: bits of the linear inputs, 16 leaves them unquantised; default: as saved
        kernels: on packs the weights and runs the device's kernels; off computes as the quantiser does; auto packs
            only where there are kernels, and on a CPU unpacks the weights once, if they fit
        kv_cache: int8 stores keys and values in 8 bits; default: the type the model computes in
        mesh: devices to split the work over: samples over data, matrices over model
        dtype: type the model computes in; default: float32, or bfloat16 with kernels
        json: print prompt, text and token ids as JSON at the end
    """
    from twla_jax.inference import text_generation
    from twla_jax.progress import say
    from twla_jax.text import chat as chats

    prompt = _prompt(text, prompt)
    if samples > 1 and temperature == 0:
        raise TwlaError(f"--samples {samples}: all would be the same; set --temperature")
    if system is not None and not chat:
        raise TwlaError("--system is for --chat; a plain prompt has no system prompt")
    drawn = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    sampling = sampling_of({}, temperature=temperature, seed=seed, **drawn)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    settings |= {"stop": stop_texts(stop), "cache_dtype": kv_cache}
    decoder, tokenizer, path = load_for_use(model, dtype, activation_bits, kernels, mesh_of(mesh))
    asked: Any = prompt
    if chat:
        first = [] if system is None else [{"role": "system", "content": read_text(system, "--system")}]
        asked = chats.encode_chat(tokenizer, [*first, {"role": "user", "content": prompt}])
        settings["eos_token_ids"] = chats.ends_of_answer(tokenizer, decoder.config.eos_token_ids)
    say(f"{path}, {decoder.dtype}")
    figures: dict[str, Any] = {"prompt": prompt, "path": path, "dtype": str(decoder.dtype)}
    if samples != 1:
        texts, ids = text_generation.sample_texts(decoder, tokenizer, asked, samples=samples, **settings)
        show({**figures, "texts": texts, "tokens": ids}, json, lambda: "\n---\n".join(texts))
        return
    ids, pieces = [], []
    for token, piece in text_generation.stream_text(decoder, tokenizer, asked, **settings):
        ids.append(token)
        pieces.append(piece)
        if not json:
            print(piece, end="", flush=True)
    show({**figures, "text": "".join(pieces), "tokens": ids}, json, lambda: "")


def _prompt(text: str | None, option: str | None) -> str:
    """Return the prompt, which stands behind the model or in `--prompt`."""
    if text is not None and option is not None:
        raise TwlaError("the prompt is given twice, as TEXT and as --prompt; leave one out")
    if text is not None:
        return read_text(text, "TEXT")
    if option is None:
        raise TwlaError('there is no prompt: twla generate MODEL "TEXT"')
    return read_text(option, "--prompt")


def inspect(
    out: Annotated[tyro.conf.Positional[str], argument("OUT|MODEL")],
    /,
    *,
    verify: bool = False,
    recipe: Annotated[str, argument("NAME|FILE")] = "w1.58-g128",
    json: bool = False,
) -> None:
    """Print the bits and bytes of a quantised model, counted from the stored files.

    If the model is not quantised, say whether it can be, and how many bits and bytes a recipe would take.

    Args:
        out: folder written by twla, or a model to quantise
        verify: read every byte and compare it with the saved checksums
        recipe: recipe to predict with, for a model that is not quantised
        json: print the figures as JSON
    """
    from twla_jax import recipe as recipes
    from twla_jax.jobs import loading
    from twla_jax.models.io import readers
    from twla_jax.storage import accounting, checkpoint, prediction

    place = loading.resolve_model(out, weights=False)
    if not checkpoint.is_checkpoint(place):
        if verify:
            checkpoint.read_manifest(place)  # refuses: only a quantised model says what it has to be
        figures = prediction.predict(readers.read_config(place), recipes.load_recipe(recipe))
        show(figures, json, lambda: prediction.format_prediction(figures))
        return
    read = checkpoint.verify(place, checkpoint.read_manifest(place), sizes_alone=not verify)
    account = accounting.account(place)
    if verify:
        account["bytes_verified"] = read
    said = f"\n\n{read:,} bytes are as they were saved" if verify else ""
    show(account, json, lambda: accounting.format_account(account) + said)


def load_for_use(
    model: str,
    dtype: str | None,
    activation_bits: int | None,
    kernels: Kernels,
    mesh: "Mesh | None" = None,
) -> tuple[Any, Any, str]:
    """Return the model in the requested form, its tokenizer, and a description of what runs it."""
    import jax.numpy as jnp

    from twla_jax.inference import execution
    from twla_jax.jobs import loading
    from twla_jax.models import sites

    decoder, tokenizer = loading.load(model, mesh=mesh, dtype=None if dtype is None else jnp.dtype(dtype))
    if tokenizer is None:
        raise TwlaError(f"{model}: has no tokenizer")
    if activation_bits is not None:
        decoder = sites.set_activation_bits(decoder, activation_bits)
    decoder, path = execution.for_inference(decoder, kernels, dtype=dtype, mesh=mesh)
    return decoder, tokenizer, path
