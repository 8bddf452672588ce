"""Times the HTTP side of serving alone, with a device that is made up: `python benchmarks/serve_http.py`.

The engine, its thread and the server are the real ones. In place of a model, each call takes a given time on a device
and a given time to hand over, without Python's lock, and returns made-up tokens. It prints how close tokens a second
come to those of the device alone, and what the threads of the server and of the engine cost.
"""

import argparse
import sys
import threading
import time
import types

import numpy as np
import serve


class Later:
    """An array that is there at a given time, as one on a device is."""

    def __init__(self, value: np.ndarray, ready: float):
        self._value, self._ready = value, ready

    def __array__(self, dtype=None, copy=None):
        time.sleep(max(0.0, self._ready - time.monotonic()))
        return self._value

    def __len__(self) -> int:
        return len(self._value)


class MadeUpRunner:
    """Takes the place of `runner.Runner`."""

    def __init__(self, model, settings):
        from twla_jax.serving import rows

        self._made, self._settings, self._times = rows.Made, settings, model.times
        self.chunks, self.together = (
            settings.chunks,
            {64: tuple(sorted({min(n, settings.slots) for n in (16, 64)} - {1}))},
        )
        self.blocks, self.programs, self.cache_bytes = True, {}, 0
        self.fixed = {rows: self._fixed(rows) for rows in settings.row_counts}
        self._free, self._left = 0.0, np.zeros(settings.slots, np.int32)
        self.calls = []

    def _fixed(self, rows: int) -> int:
        most = min(self._settings.steps, int(0.04 / self._times.step(rows)))
        power = 2 ** (max(1, most).bit_length() - 1)
        return max(power, 3 * power // 2 if 3 * power // 2 <= most else 0)

    def width(self, length: int) -> int | None:
        """Returns the places for a prompt."""
        return next((n for n in self.chunks if n >= length), None)

    def _call(self, slots, count: int, handing: float, taking: float):
        begun = time.monotonic()
        time.sleep(handing)
        self._free = max(self._free, begun + min(handing, taking)) + taking
        self._free = max(self._free, begun + handing)
        counts = np.minimum(self._left[slots], count)
        self._left[slots] -= counts
        tokens = np.tile(np.arange(count, dtype=np.int32) % 50 + 300, (len(counts), 1))
        return self._made(Later(tokens, self._free), Later(counts, self._free), None)

    def read(self, generations, places):
        """Returns first tokens."""
        count = next(n for n in (1, *self.together[64]) if n >= len(generations))
        self.calls.append(("read", len(generations)))
        self._left[places] = [each.max_new_tokens for each in generations]
        return self._call(np.asarray(places), 1, *self._times.read(count))

    def move(self, source: int, target: int) -> None:
        """Moves a request."""
        self._left[target], self._left[source] = self._left[source], 0

    def steps(self, rows: int, keep, count: int):
        """Returns tokens after steps that are handed over one by one."""
        taking = count * self._times.step(rows) * 1.5
        self.calls.append(("steps", rows, count))
        return self._call(np.arange(rows), count, taking, taking)

    def fixed_steps(self, rows: int, keep, *, filtered: bool):
        """Returns tokens of a loop."""
        count = self.fixed[rows]
        self.calls.append(("fixed", rows, count))
        return self._call(np.arange(rows), count, count * 6e-4, count * self._times.step(rows))


class SmolLM2:
    """What SmolLM2's calls took on an H200."""

    def step(self, rows: int) -> float:
        """Returns the seconds of a decode step."""
        return 0.67e-3 if rows == 1 else 0.84e-3 if rows <= 8 else 1.6e-3

    def read(self, count: int) -> tuple[float, float]:
        """Returns the seconds for handing over prompts, and those that the device takes."""
        return (11e-3, 6e-3) if count == 1 else (14e-3, 8e-3) if count <= 16 else (14e-3, 14e-3)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=384, help="tokens of an answer")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--calls", action="store_true", help="print the calls")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    counts = sorted(map(int, options.clients.split(",")))

    from twla_jax.serving import engine as engines
    from twla_jax.serving.app import Service
    from twla_jax.serving.server import Server, listen
    from twla_jax.serving.settings import ServiceSettings

    engines.Runner = MadeUpRunner
    times = SmolLM2()
    config = types.SimpleNamespace(
        vocab_size=49152, eos_token_ids=(2,), rope_scaling=None, max_position_embeddings=8192
    )
    engine = engines.Engine(types.SimpleNamespace(config=config, times=times), serve.engine_settings(options))
    engine.config = config
    service = Service(engine, serve.plain_tokenizer(config.vocab_size), ServiceSettings(model="m"))
    server = Server(service, grace=5)
    spent = {}

    def served(sockets):
        if options.profile:
            import cProfile
            import pstats

            profile = cProfile.Profile(time.thread_time)
            profile.runcall(server.run, sockets=sockets)
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
        else:
            server.run(sockets=sockets)

    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=served, args=([listening],), daemon=True)
        thread.start()
        for count in counts:
            asked = {"count": count, "prompt": options.prompt, "new": options.new, "top_p": None}
            through = {**asked, "port": listening.getsockname()[1], "model": "m"}
            for way, go in (
                ("engine", lambda asked=asked: serve.run(engine, **asked)),
                ("server", lambda asked=through: serve.in_a_process(asked)),
            ):
                go()
                engine._runner.calls.clear()
                clock = time.pthread_getcpuclockid(thread.ident)
                own = time.pthread_getcpuclockid(engine._thread.ident)
                before = time.clock_gettime(clock), time.clock_gettime(own)
                found = go()
                spent = time.clock_gettime(clock) - before[0], time.clock_gettime(own) - before[1]
                bare = count / times.step(count)
                print(
                    f"{way} {count}: {found['rate']:.0f} tokens/s, {found['rate'] / bare:.0%} "
                    f"(together {found['together'] / bare:.0%}), first {1e3 * found['first']:.0f} ms, "
                    f"last first {1e3 * found['first_of_all']:.0f} ms; CPU of the server's thread "
                    f"{1e3 * spent[0]:.1f} ms, of the engine's {1e3 * spent[1]:.1f} ms",
                    flush=True,
                )
                if options.calls:
                    print(engine._runner.calls)
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
