"""Many clients at one server for some minutes: `python benchmarks/serve_load.py MODEL --clients 64 --seconds 600`.

Each client asks again and again. Most answers are compared with those that the same requests got alone, before, and
these with what `twla generate` makes. Some clients read slowly, some leave in mid-stream, before the answer or in the
middle of their request, some send what is no request. Then the server is told to stop in the middle of streams, and is
started again. It ends with a table, and fails if an answer was another or was lost, a stream did not end in order, or a
wrong request was not refused.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import json
import random
import resource
import subprocess
import sys
import threading
import time

HEADERS = {"content-type": "application/json"}
WRONG = (
    (b"{", 400),
    (b'{"model": "m"}', 400),
    (b'{"model": "other", "prompt": "a"}', 404),
    (b'{"model": "m", "prompt": "a", "temperature": 1e400}', 400),
    (b'{"model": "m", "prompt": "a", "max_tokens": 10000000}', 400),
    (b"[" * 100_000, 400),
    (b" " * (2**20 + 1), 413),
)


def main() -> None:
    """Run the server here and the clients in a process of their own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--requests", type=int, default=48, help="different ones")
    parser.add_argument("--attack", help=argparse.SUPPRESS)  # what the process of the clients is told
    options = parser.parse_args()
    if options.attack:
        with open(options.attack, encoding="utf-8") as file:
            print(json.dumps(attack(**json.load(file))))
        return
    if options.model is None:
        parser.error("MODEL is missing")
    sys.exit(not run(options))


def run(options: argparse.Namespace) -> bool:
    """Returns whether all was well."""
    import tempfile

    from twla_jax import xla_flags

    xla_flags.disable_triton_gemm()
    from twla_jax.cli.use import load_for_use
    from twla_jax.serving.app import Service
    from twla_jax.serving.engine import Engine
    from twla_jax.serving.server import Server, listen
    from twla_jax.serving.settings import EngineSettings, ServiceSettings

    model, tokenizer, path = load_for_use(options.model, None, None, "auto")
    # One shape, so that not even the last bit depends on how many requests run.
    settings = EngineSettings(
        slots=options.slots, rows=(options.slots,), max_length=256, queue=options.clients // 2
    )

    @contextlib.contextmanager
    def serving():
        server = Server(Service(Engine(model, settings), tokenizer, ServiceSettings(model="m")), grace=0)
        with listen("127.0.0.1", 0) as listening:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            try:
                yield server, listening.getsockname()[1]
            finally:
                server.should_exit = True
                thread.join()

    asked = requests(options.requests)
    offline = [generated(model, tokenizer, body) for body in asked]
    with serving() as (server, port), tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        known = [ask(port, body)[0] for body in asked]  # one after the other: each alone
        before = resident()
        told = {"port": port, "asked": asked, "known": known}
        json.dump({**told, "clients": options.clients, "seconds": options.seconds}, file)
        file.flush()
        command = [sys.executable, __file__, "--attack", file.name]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        after = resident()
        again = [ask(port, body)[0] for body in asked]
        ended = stopped_in_mid_stream(server, port, options.slots)
    with serving() as (_, port):
        restarted = [ask(port, body)[0] for body in asked]
    print(f"\n{path}; {options.clients} clients, {options.slots} slots, {options.seconds:.0f} s\n")
    print("| | |\n|---|---|")
    for name, count in sorted(found.items()):
        print(f"| {name} | {count} |")
    print(f"| memory of the server before and after, at most | {before} and {after} MB, {peak()} MB |")
    for name, others in (
        ("generated", offline),
        ("after it", again),
        ("of the server started again", restarted),
    ):
        print(
            f"| answers {name} that are as those alone | {sum(map(str.__eq__, known, others))} of {len(known)} |"
        )
    print(f"| streams that were stopped, and said so | {ended.count('stopped')} of {len(ended)} |")
    bad = [name for name in found if name.startswith("wrong")] + [each for each in ended if each == "lost"]
    return not bad and known == offline == again == restarted


def generated(model, tokenizer, body: dict) -> str:
    """Returns what `twla generate` makes of a request."""
    from twla_jax.inference import text_generation
    from twla_jax.inference.sampling import Sampling

    drawn = {name: body[name] for name in ("temperature", "top_p", "seed") if name in body}
    settings = {"max_new_tokens": body["max_tokens"], "stop": tuple(body.get("stop", ()))}
    pieces = text_generation.stream_text(
        model, tokenizer, body["prompt"], sampling=Sampling(**drawn), **settings
    )
    return "".join(piece for _, piece in pieces)


def stopped_in_mid_stream(server, port: int, count: int) -> list[str]:
    """Returns how each of so many streams ended when the server was told to stop once all had an answer's head."""
    answered = threading.Barrier(count)
    body = {"model": "m", "prompt": "the river", "max_tokens": 200, "temperature": 0, "ignore_eos": True}

    def stream(_: int) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}), HEADERS)
            last = b""
            with connection.getresponse() as response:
                answered.wait(timeout=60)
                server.should_exit = True
                for line in response:
                    last = line if line.startswith(b"data: ") else last
        return "stopped" if b'"error"' in last else "whole" if last.startswith(b"data: [DONE]") else "lost"

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(stream, range(count)))


def requests(count: int) -> list[dict]:
    """Returns bodies with prompts of many lengths; some greedy, some sampled, some ended by a text."""
    words = [
        "the",
        "river",
        "runs",
        "through",
        "a",
        "green",
        "valley",
        "where",
        "old",
        "trees",
        "stand",
        "still",
    ]
    chance = random.Random(0)
    found = []
    for index in range(count):
        prompt = " ".join(chance.choices(words, k=1 + index % 30))
        body = {"model": "m", "prompt": prompt, "max_tokens": 4 + 7 * index % 60, "temperature": 0}
        if index % 2:
            body |= {"temperature": 0.8, "top_p": 0.9, "seed": index}
        if index % 5 == 0:
            body["stop"] = [" the"]
        found.append(body)
    return found


def ask(
    port: int, body: dict, *, stream: bool = False, pause: float = 0, leave: bool = False
) -> tuple[str, int]:
    """Returns an answer's text and the status; None-like text where the client left or was refused."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with contextlib.closing(connection):
        sent = json.dumps({**body, "stream": stream or bool(pause) or leave})
        connection.request("POST", "/v1/completions", sent, HEADERS)
        with connection.getresponse() as response:
            if response.status != 200:
                response.read()
                return "", response.status
            if not (stream or pause or leave):
                return json.loads(response.read())["choices"][0]["text"], 200
            text, ended = "", False
            for line in response:
                if line.startswith(b"data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    text, ended = text + choice["text"], choice["finish_reason"] is not None
                    time.sleep(pause)
                    if leave:
                        return "", 200
            return text if ended else "lost", 200


def leave(port: int, body: dict, *, half: bool) -> None:
    """Sends a request, or half of one, and goes away without reading."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with contextlib.closing(connection):
        sent = json.dumps(body).encode()
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", str(len(sent)))
        connection.endheaders(sent[: len(sent) // 2] if half else sent)


def attack(*, port: int, asked: list[dict], known: list[str], clients: int, seconds: float) -> dict[str, int]:
    """Returns how often what happened."""
    counts: collections.Counter[str] = collections.Counter()
    until, lock = time.monotonic() + seconds, threading.Lock()

    def count(name: str) -> None:
        with lock:
            counts[name] += 1

    def once(chance: random.Random) -> None:
        kind, index = chance.random(), chance.randrange(len(asked))
        if kind < 0.1:
            body, status = chance.choice(WRONG)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
            with contextlib.closing(connection):
                connection.request("POST", "/v1/completions", body, HEADERS)
                with connection.getresponse() as response:
                    response.read()
            count("no requests, refused" if response.status == status else "wrong: no request, not refused")
            return
        if kind < 0.13:
            leave(port, asked[index], half=kind < 0.12)
            count(
                "clients that left before the answer" if kind >= 0.12 else "clients that sent half a request"
            )
            return
        if kind < 0.15:
            ask(port, asked[index], leave=True)
            count("clients that left")
            return
        text, status = ask(port, asked[index], stream=kind < 0.6, pause=0.05 if kind < 0.2 else 0)
        if status == 429:
            count("told to come again")
            time.sleep(chance.uniform(0.2, 1))
        elif status != 200:
            count(f"wrong: status {status}")
        else:
            count("answers as alone" if text == known[index] else "wrong: another answer")

    def client(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < until:
            try:
                once(chance)
            except (OSError, http.client.HTTPException) as error:
                # A body that is too long may be cut off while it is sent.
                count(
                    "cut off"
                    if isinstance(error, BrokenPipeError | ConnectionResetError)
                    else f"wrong: {error!r}"
                )

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return dict(counts)


def resident() -> int:
    """Returns the megabytes that this process has in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 2**20


def peak() -> int:
    """Returns the megabytes that this process had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
