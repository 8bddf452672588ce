"""Times serving beside bare decoding, on one GPU: `python benchmarks/serve.py`.

Models are random and packed, of a known shape. For each it times decode steps as `twla bench decode` does, then the
engine in this process, then the server, with clients in a process of their own. All requests come at once, and all go
on to their last token. The table comes last; its last column says what part of the time the engine's thread spent on
handing over prompts, on handing over steps, on waiting for the device and on telling tokens. It fails where an answer
is incomplete.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator


def main() -> None:
    """Measure every model and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="smollm2-135m,llama-2-7b")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=384, help="tokens of an answer")
    parser.add_argument("--activation-bits", type=int, default=4)
    parser.add_argument("--embedding-bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a call at most")
    parser.add_argument(
        "--top-p", type=float, help="draw with this top-p; by default the likeliest tokens are taken"
    )
    parser.add_argument("--kv-cache", choices=["int8"], default=None)
    parser.add_argument("--ask", help=argparse.SUPPRESS)  # what the process of the clients is told
    options = parser.parse_args()
    if options.ask:
        print(json.dumps(ask(**json.loads(options.ask))))
        return
    rows = []
    for shape in options.shapes.split(","):
        for row in measure(shape, options):
            rows.append(row)
            print(line(row), flush=True)  # all there is if the time runs out
    print("\n" + HEAD)
    for row in rows:
        print(line(row))


def said(shape: str, begun: float, what: str) -> None:
    """Prints how long something took."""
    print(f"{shape}: {what} {time.perf_counter() - begun:.0f} s", flush=True)


def engine_settings(options: argparse.Namespace, **more):
    """Return an engine's settings with a slot for each client, and room for a prompt and its answer."""
    from twla_jax.serving.settings import EngineSettings

    counts = sorted(map(int, options.clients.split(",")))
    return EngineSettings(
        slots=counts[-1],
        rows=tuple(counts),
        chunks=(64,),
        max_length=options.prompt + options.new,
        steps=options.steps,
        **more,
    )


def measure(shape: str, options: argparse.Namespace) -> Iterator[dict]:
    """Yields two rows for each number of clients: of the engine alone, and of the server."""
    from twla_jax import xla_flags

    xla_flags.disable_triton_gemm()
    from twla_jax.bench import SHAPES, decode, shapes
    from twla_jax.serving.app import Service
    from twla_jax.serving.engine import Engine
    from twla_jax.serving.server import Server, listen
    from twla_jax.serving.settings import ServiceSettings

    counts = sorted(map(int, options.clients.split(",")))
    bits = {"activation_bits": options.activation_bits, "embedding_bits": options.embedding_bits}
    begun = time.perf_counter()
    model = shapes.random_decoder(SHAPES[shape], **bits)
    said(shape, begun, "random weights took")
    # As many tokens before a step as the requests have in their middle.
    bare = decode.DecodeSettings(context=options.prompt + options.new // 2, cache_dtype=options.kv_cache)
    begun = time.perf_counter()
    step = {count: decode.step_seconds(model, count, bare) for count in counts}
    said(shape, begun, "decode steps as in twla bench took")
    settings = engine_settings(options, cache_dtype=options.kv_cache)
    begun = time.perf_counter()
    engine = Engine(model, settings)
    said(shape, begun, "starting the engine took")
    print(f"{shape}: steps of a loop by rows: {engine.fixed}", flush=True)
    service = Service(engine, plain_tokenizer(model.config.vocab_size), ServiceSettings(model=shape))
    server = Server(service, grace=5)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        for count in counts:
            asked = {"count": count, "prompt": options.prompt, "new": options.new, "top_p": options.top_p}
            through_http = {**asked, "port": listening.getsockname()[1], "model": shape}
            few = {"new": min(options.new, 96)}
            ways: dict[str, Callable[..., dict]] = {
                "engine": lambda asked=asked, **few: run(engine, **asked | few),
                "server": lambda asked=through_http, **few: in_a_process(asked | few),
            }
            for way, go in ways.items():
                go(**few)  # once to warm up
                before = dict(engine.seconds)
                found = go()
                whole = found["tokens"] / found["rate"]
                found["spent"] = {name: (engine.seconds[name] - before[name]) / whole for name in before}
                if found["tokens"] != count * options.new:
                    raise SystemExit(f"{shape}, {way}: {found['tokens']} tokens of {count * options.new}")
                yield {"shape": shape, "way": way, "clients": count, "bare": count / step[count], **found}
        server.should_exit = True
        thread.join()


def run(engine, *, count: int, prompt: int, new: int, top_p: float | None) -> dict:
    """Returns the figures of `count` requests that are given to the engine at once."""
    from twla_jax.inference.sampling import Sampling
    from twla_jax.serving.requests import Generation

    sampling = Sampling() if top_p is None else Sampling(temperature=1.0, top_p=top_p)

    arrived: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    left = threading.Semaphore(0)

    def sink(times):
        def put(delivery):
            times.append((time.perf_counter(), len(delivery.tokens)))
            if delivery.reason is not None:
                left.release()

        return put

    begun = time.perf_counter()
    engine.submit_all(
        [
            (
                Generation(prompt=tuple(tokens_of(i, prompt)), max_new_tokens=new, sampling=sampling),
                sink(times),
            )
            for i, times in enumerate(arrived)
        ]
    )
    for _ in range(count):
        left.acquire()
    return figures(begun, arrived)


def figures(begun: float, arrived: list[list[tuple[float, int]]]) -> dict:
    """Returns tokens a second, over all of the time and while all requests ran, and times to the first token."""
    first = [times[0][0] for times in arrived]
    end = max(times[-1][0] for times in arrived)
    every = sorted(each for times in arrived for each in times)
    last, stop = max(first), min(times[-1][0] for times in arrived)
    together = sum(tokens for moment, tokens in every if last < moment <= stop)
    tokens = sum(tokens for _, tokens in every)
    return {
        "tokens": tokens,
        "rate": tokens / (end - begun),
        "together": together / (stop - last) if stop > last else float("nan"),
        "first": statistics.median(first) - begun,
        "first_of_all": max(first) - begun,
    }


def in_a_process(asked: dict) -> dict:
    """Returns what `ask` finds, in a process that does not share this one's interpreter."""
    command = [sys.executable, __file__, "--ask", json.dumps(asked)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def ask(*, count: int, prompt: int, new: int, top_p: float | None, port: int, model: str) -> dict:
    """Returns the figures of `count` clients that read streams over HTTP.

    They share one thread and one event loop, and look into the events only after the last has come: a client of its own
    thread for each would mostly wait for Python's lock.
    """
    sampling = {"temperature": 0} if top_p is None else {"temperature": 1, "top_p": top_p}
    head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close"

    def asked(index: int) -> bytes:
        body = {"model": model, "prompt": tokens_of(index, prompt), "max_tokens": new, **sampling}
        body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        sent = json.dumps(body).encode()
        return f"{head}\r\ncontent-length: {len(sent)}\r\n\r\n".encode() + sent

    async def one(connection, request: bytes) -> list[tuple[float, bytes]]:
        reader, writer = connection
        writer.write(request)
        came = []
        while data := await reader.read(2**16):
            came.append((time.perf_counter(), data))
        writer.close()
        return came

    async def all_at_once():
        connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
        requests = [asked(index) for index in range(count)]
        begun = time.perf_counter()
        return begun, await asyncio.gather(*map(one, connections, requests))

    begun, came = asyncio.run(all_at_once())
    return figures(begun, [tokens_in(each) for each in came])


def tokens_in(came: list[tuple[float, bytes]]) -> list[tuple[float, int]]:
    """Returns when how many tokens came, of a stream that is whole; a word is a token."""
    times, whole, rest = [], None, b""
    for moment, data in came:
        *lines, rest = (rest + data).split(b"\n")
        words = 0
        for line in lines:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event["choices"]:
                    words += len(event["choices"][0]["text"].split())
                else:
                    whole = event["usage"]["completion_tokens"]
        if words:
            times.append((moment, words))
    assert sum(tokens for _, tokens in times) == whole, (times, whole, came[:1])
    return times


def tokens_of(seed: int, count: int) -> list[int]:
    """Returns the tokens of a prompt."""
    return [(7 * seed + 13 * i) % 250 + 3 for i in range(count)]


def plain_tokenizer(size: int):
    """Returns a tokenizer with a word for every token."""
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


HEAD = """\
| model | | clients | tokens/s | of bench decode | while all run | first token, ms | last of the first | reads, steps, \
waiting, telling |
|---|---|---|---|---|---|---|---|---|"""


def line(row: dict) -> str:
    """Returns the line of a row in the table."""
    cells = [
        row["shape"],
        row["way"],
        row["clients"],
        f"{row['rate']:.0f}",
        f"{row['rate'] / row['bare']:.0%}",
        f"{row['together'] / row['bare']:.0%}",
        f"{1e3 * row['first']:.0f}",
        f"{1e3 * row['first_of_all']:.0f}",
        ", ".join(f"{part:.0%}" for part in row["spent"].values()),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
