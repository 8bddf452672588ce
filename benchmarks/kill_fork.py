"""Starts the commands that `kill.py` attacks from a process that has imported the libraries: twice as many an hour."""

import atexit
import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import NoReturn

IMPORTED = (
    *("jax", "flax.nnx", "optax", "orbax.checkpoint", "gguf", "safetensors", "matplotlib.pyplot", "jinja2"),
    *("transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_fast", "uvicorn"),
    *(f"twla_jax.jobs.{each}" for each in ("quantize_model", "allocate_bits", "compare_recipes", "stages")),
    *(f"twla_jax.jobs.{each}" for each in ("export_model", "write_report", "domain_check", "loading")),
    *(
        f"twla_jax.{each}"
        for each in ("cli.main", "cli.make", "cli.use", "serving.app", "inference.text_generation")
    ),
)
# What JAX reads of the environment when it is imported, by the names of its settings.
SETTINGS = {
    "jax_compilation_cache_dir": str,
    "jax_compilation_cache_max_size": int,
    "jax_persistent_cache_min_compile_time_secs": float,
    "jax_raise_persistent_cache_errors": lambda value: value == "true",
}


def import_libraries() -> None:
    """Import what the commands import; nothing may start a device or a thread, which no fork would survive."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    from jax._src import xla_bridge

    assert not xla_bridge._backends
    assert threading.active_count() == 1


class Forked:
    """A process that runs Python code, with what `subprocess.Popen` has for it; its streams are pipes of text."""

    def __init__(self, code: str, arguments: Sequence[str], environment: Mapping[str, str]):
        """Start the process."""
        ends = [os.pipe() for _ in range(3)]
        inside = (ends[0][0], ends[1][1], ends[2][1])
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            for number, end in enumerate(inside):
                os.dup2(end, number)
            for end in (each for pair in ends for each in pair):
                os.close(end)
            _become(code, arguments, environment)
        for end in inside:
            os.close(end)
        self.stdin = os.fdopen(ends[0][1], "w")
        self.stdout, self.stderr = os.fdopen(ends[1][0]), os.fdopen(ends[2][0])

    def __enter__(self) -> "Forked":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the streams and wait for its end."""
        for stream in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(OSError):
                stream.close()
        self.wait()

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Return the exit status, or the signal that ended it as a negative number."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _become(code: str, arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Run the code as `python -c` does, and end the process."""
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["-c", *arguments]
    os.environ.clear()
    os.environ.update(environment)
    import jax

    from twla_jax import compilation_cache

    kept = {"jax_compilation_cache_dir": environment["TWLA_COMPILATION_CACHE"]}
    kept["jax_compilation_cache_max_size"] = compilation_cache._MOST_BYTES
    kept |= {name: environment[name.upper()] for name in SETTINGS if name.upper() in environment}
    for name, value in kept.items():
        jax.config.update(name, SETTINGS[name](value))
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        status = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a stream was closed
        pass
    finally:
        if status == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(status)
