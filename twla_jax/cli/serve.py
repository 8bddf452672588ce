"""Defines the command `serve`, which answers requests over HTTP."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from twla_jax.cli.options import (
    Kernels,
    Model,
    OptionalBits,
    OptionalDtype,
    OptionalFile,
    OptionalMesh,
    argument,
    mesh_of,
    number,
)
from twla_jax.cli.use import load_for_use
from twla_jax.errors import TwlaError

KEY = "TWLA_API_KEY"
_MAX_LENGTH = 2048
_NEEDED = ("starlette", "uvicorn", "prometheus_client")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LOCAL_NAMES = ("127.0.0.1", "[::1]", "localhost")  # by which clients on this machine call it
OptionalLength = Annotated[int | None, number("max_length"), tyro.conf.arg(help_behavior_hint="")]


def serve(
    model: Model,
    /,
    *,
    host: Annotated[str, argument("ADDRESS")] = "127.0.0.1",
    port: Annotated[int, number("port")] = 8000,
    model_name: Annotated[str | None, argument("NAME", optional=True)] = None,
    slots: Annotated[int, number("slots")] = 16,
    max_length: OptionalLength = None,
    queue: Annotated[int, number("queue")] = 64,
    steps: Annotated[int, number("steps")] = 32,
    one_shape: bool = False,
    max_body: Annotated[int, number("max_body", "BYTES")] = 2**20,
    grace: Annotated[int, number("grace", "SECONDS")] = 30,
    api_key_file: OptionalFile = None,
    activation_bits: OptionalBits = None,
    kernels: Kernels = "auto",
    kv_cache: Annotated[Literal["int8"] | None, argument("int8", optional=True)] = None,
    mesh: OptionalMesh = None,
    dtype: OptionalDtype = None,
) -> None:
    """Answer completions and chats over HTTP as OpenAI's API does, with streaming.

    Requests run together in slots of one cache. The server listens on this machine alone unless --host says otherwise.
    If the variable TWLA_API_KEY or --api-key-file has a key, clients must send it. Ctrl-C lets running requests finish.

    Args:
        model: folder written by twla, Hugging Face folder, .gguf file, hub id (org/name), or smollm2
        host: address to listen on; 0.0.0.0 for all addresses of this machine
        port: port to listen on; 0 takes a free one
        model_name: name of the model in requests; default: the last part of MODEL
        slots: requests that run together; each takes memory for --max-length tokens
        max_length: most tokens of a request, prompt and answer together; default: 2048, or the model's positions if
            these are fewer
        queue: requests that may wait for a slot; further ones are refused with status 429
        steps: most decode steps before the server looks at the queue again, fewer if they take long; a stream gets so
            many tokens at a time
        one_shape: run all slots at every step and read prompts one by one, so that not even the last bit of an answer
            depends on other requests
        max_body: most bytes of a request
        grace: seconds that running requests have to finish when the server stops
        api_key_file: file with the key that clients must send
        activation_bits: bits of the linear inputs, 16 leaves them unquantised; default: as saved
        kernels: on packs the weights and runs the device's kernels; off computes as the quantiser does; auto packs
            only where there are kernels, and on a CPU unpacks the weights once, if they fit
        kv_cache: int8 stores keys and values in 8 bits; default: the type the model computes in
        mesh: devices to split the model over, as model=2
        dtype: type the model computes in; default: float32, or bfloat16 with kernels
    """
    if any(importlib.util.find_spec(each) is None for each in _NEEDED):
        raise TwlaError(
            "serving needs starlette, uvicorn and prometheus-client: pip install 'twla-jax[serve]'"
        )
    from twla_jax.jobs import loading
    from twla_jax.progress import say
    from twla_jax.serving import app, engine, placement, server
    from twla_jax.serving.settings import EngineSettings, ServiceSettings

    key, devices = key_of(api_key_file), mesh_of(mesh)
    if devices is not None:
        placement.require_whole_batches(devices)
    with server.listen(host, port) as listening:  # before the work that a wrong address would waste
        decoder, tokenizer, path = load_for_use(model, dtype, activation_bits, kernels, devices)
        most = decoder.config.max_position_embeddings
        settings = EngineSettings(
            slots=slots,
            max_length=min(_MAX_LENGTH, most) if max_length is None else max_length,
            queue=queue,
            steps=steps,
            one_shape=one_shape,
            cache_dtype=kv_cache,
        )
        say(f"compiling for {', '.join(map(str, settings.row_counts))} rows ({path}, {decoder.dtype})")
        running = engine.Engine(decoder, settings)
        called = model_name or Path(model).name or "model"
        suggested = _suggested(loading.suggested_sampling(model))
        hosts = _LOCAL_NAMES if key is None and host in _LOOPBACK else ()
        about = ServiceSettings(model=called, key=key, hosts=hosts, max_body=max_body, suggested=suggested)
        service = app.Service(running, tokenizer, about)
        said = _ready(host, listening.getsockname()[1], called, running, key)
        server.serve(service, listening, grace=grace, ready=lambda: say(said))


def key_of(file: str | None) -> str | None:
    """Return the key that clients must bear: that in a file, else in the variable TWLA_API_KEY; None for none.

    Raises:
      TwlaError: there is something else than one key.
    """
    if file is None:
        given = os.environ.get(KEY, "")
        return _one_key(given, KEY) if given else None
    try:
        return _one_key(Path(file).read_text(encoding="utf-8"), file)
    except UnicodeError:
        raise TwlaError(f"{file}: not UTF-8 text") from None


def _one_key(text: str, place: str) -> str:
    """Return the key in a text, without the blanks and line ends around it, which no client can send."""
    key = text.strip()
    if not key or not key.isprintable():
        raise TwlaError(f"{place}: must hold one key, on one line")
    return key


def _suggested(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the sampling settings that the model's files suggest, without what is not done here."""
    if settings.get("repetition_penalty", 1) != 1:
        _warn("the repetition_penalty that the model's files suggest is not applied")
    return {name: value for name, value in settings.items() if name != "repetition_penalty"}


def _ready(host: str, port: int, name: str, running: Any, key: str | None) -> str:
    settings = running.settings
    shown = f"[{host}]" if ":" in host else host
    said = f"{name} at http://{shown}:{port}/v1; {settings.slots} slots of {settings.max_length} tokens"
    said += f", {running.cache_bytes / 1e9:.2f} GB of keys and values"
    if key is None and host not in _LOOPBACK:
        said += f"; anyone who reaches this address may use it: set {KEY} for a key"
    return said


def _warn(message: str) -> None:
    print(f"twla: {message}", file=sys.stderr, flush=True)
