"""Times serving beside bare decoding, on one GPU: `python benchmarks/serve.py`.

Models are random and packed, of a known shape. For each it times decode steps as `twla bench decode` does, then the
engine in this process, then the server, with clients in a process of their own. All requests come at once, and all go
on to their last token. The table comes last; its last column says what part of the time the engine's thread spent on
handing over prompts, on handing over steps, on waiting for the device and on telling tokens. It fails where an answer
is incomplete.
"""

import argparse
import concurrent.futures
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable


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
        begun = time.perf_counter()
        rows += measure(shape, options)
        print(f"{shape}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    print_table(rows)


def measure(shape: str, options: argparse.Namespace) -> list[dict]:
    """Returns a row for each number of clients."""
    from twla_jax import xla_flags

    xla_flags.disable_triton_gemm()
    from twla_jax.bench import SHAPES, decode, shapes
    from twla_jax.serving.app import Service
    from twla_jax.serving.engine import Engine
    from twla_jax.serving.server import Server, listen
    from twla_jax.serving.settings import EngineSettings, ServiceSettings

    counts = sorted(map(int, options.clients.split(",")))
    bits = {"activation_bits": options.activation_bits, "embedding_bits": options.embedding_bits}
    model = shapes.random_decoder(SHAPES[shape], **bits)
    # As many tokens before a step as the requests have in their middle.
    bare = decode.DecodeSettings(context=options.prompt + options.new // 2, cache_dtype=options.kv_cache)
    step = {count: decode.step_seconds(model, count, bare) for count in counts}
    settings = EngineSettings(
        slots=counts[-1],
        rows=tuple(counts),
        chunks=(64,),
        max_length=options.prompt + options.new,
        steps=options.steps,
        cache_dtype=options.kv_cache,
    )
    begun = time.perf_counter()
    engine = Engine(model, settings)
    compiled = time.perf_counter() - begun
    service = Service(engine, plain_tokenizer(model.config.vocab_size), ServiceSettings(model=shape))
    server, rows = Server(service, grace=5), []
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        for count in counts:
            asked = {"count": count, "prompt": options.prompt, "new": options.new, "top_p": options.top_p}
            through_http = {**asked, "port": listening.getsockname()[1], "model": shape}
            ways: dict[str, Callable[[], dict]] = {
                "engine": lambda asked=asked: run(engine, **asked),
                "server": lambda asked=through_http: in_a_process(asked),
            }
            for way, go in ways.items():
                go()  # once to warm up
                before = dict(engine.seconds)
                found = go()
                whole = found["tokens"] / found["rate"]
                found["spent"] = {name: (engine.seconds[name] - before[name]) / whole for name in before}
                if found["tokens"] != count * options.new:
                    raise SystemExit(f"{shape}, {way}: {found['tokens']} tokens of {count * options.new}")
                rows.append(
                    {"shape": shape, "way": way, "clients": count, "bare": count / step[count], **found}
                )
        server.should_exit = True
        thread.join()
    print(
        f"{shape}: engine started in {compiled:.0f} s; steps of a loop by rows: {engine.fixed}",
        file=sys.stderr,
    )
    return rows


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
    """Returns the figures of `count` clients that read streams over HTTP."""
    sampling = {"temperature": 0} if top_p is None else {"temperature": 1, "top_p": top_p}
    together = threading.Barrier(count + 1)

    def one(index: int) -> list[tuple[float, int]]:
        body = {"model": model, "prompt": tokens_of(index, prompt), "max_tokens": new, **sampling}
        body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.connect()
        together.wait()
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        times, whole = [], 0
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event["choices"]:
                    # A word a token, with a space between two.
                    times.append((time.perf_counter(), len(event["choices"][0]["text"].split())))
                else:
                    whole = event["usage"]["completion_tokens"]
        assert sum(tokens for _, tokens in times) == whole, (times, whole)
        return times

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        running = [pool.submit(one, index) for index in range(count)]
        together.wait()
        begun = time.perf_counter()
        return figures(begun, [each.result() for each in running])


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


def print_table(rows: list[dict]) -> None:
    """Prints a line a row."""
    print(
        "\n| model | | clients | tokens/s | of bench decode | while all run | first token, ms | last of the first "
        "| prompts, steps, waiting, telling |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            row["shape"],
            row["way"],
            row["clients"],
            f"{row['rate']:.0f}",
            f"{row['rate'] / row['bare']:.0%}",
        ]
        cells += [
            f"{row['together'] / row['bare']:.0%}",
            f"{1e3 * row['first']:.0f}",
            f"{1e3 * row['first_of_all']:.0f}",
            ", ".join(f"{part:.0%}" for part in row["spent"].values()),
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
