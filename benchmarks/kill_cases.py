"""Commands for `kill.py`, each with what it needs and the one folder that it writes to, and how they are run."""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import kill_fork

# A command in a process of its own, which is stopped before its change number `last` of the file system.
CHILD = """
import errno, os, signal, sys
place, last, how, changes, needs_room = sys.argv[1], int(sys.argv[2]), sys.argv[3], 0, []
written = os.O_WRONLY | os.O_RDWR | os.O_CREAT
grows = {"open", "os.mkdir", "os.link", "os.symlink"}
names = {"os.rename", "os.remove", "os.rmdir", "os.truncate", "os.utime", "shutil.rmtree", *grows}

def hear(event, arguments):
    global changes
    if event not in names or event == "open" and not (isinstance(arguments[2], int) and arguments[2] & written):
        return
    inside = event in ("os.remove", "os.rmdir") and arguments[-1] != -1  # of a folder that is removed whole
    if not inside and place not in str(arguments[:2]):
        return
    changes += 1
    if event in grows:
        needs_room.append(changes - 1)
    if how == "full disk":
        if 0 <= last < changes and event in grows:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
    elif changes == last + 1:
        os.kill(os.getpid(), getattr(signal, how))

def count():
    print(f"changes: {changes}", "need room:", *needs_room, file=sys.stderr, flush=True)

def count_and_end(number, _):
    count()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)

signal.signal(signal.SIGINT, signal.default_int_handler)
if how == "none":  # a server that is told to stop ends by the signal, and never gets to the last line
    signal.signal(signal.SIGTERM, count_and_end)
sys.addaudithook(hear)
from twla_jax.cli import main
print("begins", file=sys.stderr, flush=True)
try:
    main.main(sys.argv[4:])
finally:
    count()
"""
FULL = "full disk"
TWO_DEVICES = "--xla_force_host_platform_device_count=2"
RECIPE = """
rotation.steps = 2
activations.clip_tokens = 64
calibration = {windows = 16, seq_len = 64}  # with less, the model is broken and refused
[weights]
group_size = 16
ternary.rounds = 1
"""
INTEGERS = """
rotation = false
activations.clip_tokens = 64
calibration = {windows = 16, seq_len = 64}
weights = {group_size = 16, integer.bits = 3}
"""
REFINED = RECIPE + '[refine.end_to_end]\nsteps = 2\nbatch = 2\ndtype = "float32"\n'
SERVED = {"prompt": "Once", "max_tokens": 8, "temperature": 0}
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A command that changes nothing but what lies in `to`, where `before` lies when it begins."""

    command: tuple[str, ...]
    to: Path
    before: Path
    asked: str = ""  # on standard input
    keeps_programs: bool = False  # all that it writes is the cache of compiled programs
    forked: bool = False  # from this process, which has imported the libraries

    @property
    def cache(self) -> Path:
        """Return where compiled programs are kept; those of commands that write more are kept from run to run."""
        return self.to / "cache" if self.keeps_programs else self.before.parent / "cache"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended: status, what it wrote, its changes of the file system (None if killed) and seconds.

    `need_room` are the numbers of the changes that a full disk refuses.
    """

    status: int
    output: str
    errors: list[str]
    changes: int | None
    seconds: float
    need_room: tuple[int, ...] = ()


def run(case: Case, last: int = -1, how: str = "none", after: float | None = None) -> Ended:
    """Run a command, stopped before a change or so many seconds after it began."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TWLA_COMPILATION_CACHE": str(case.cache)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if case.keeps_programs:
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # which would go before
    if how != FULL:  # a damaged program would be an error
        environment["JAX_RAISE_PERSISTENT_CACHE_ERRORS"] = "true"
    if "--mesh" in case.command:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {TWO_DEVICES}"
    arguments = [str(case.to), str(last), how, *case.command]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    timers, answers, lines = [], [], []
    started = (
        kill_fork.Forked(CHILD, arguments, environment)
        if case.forked
        else subprocess.Popen([sys.executable, "-c", CHILD, *arguments], env=environment, text=True, **pipes)
    )
    with started as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(case.asked)
            process.stdin.close()
        begun = time.monotonic()
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            if line == "begins\n" and after is not None:
                timers.append(threading.Timer(after, process.send_signal, [getattr(signal, how)]))
                timers[-1].start()
            if port := re.search(r"127\.0\.0\.1:(\d+)/v1", line):
                answers.append(ask(int(port[1])))
                process.terminate()
        output = process.stdout.read()
        process.wait()
        for timer in timers:
            timer.cancel()
    counts = [re.findall(r"\d+", line) for line in lines if line.startswith("changes: ")]
    counted = [list(map(int, each)) for each in counts]
    return Ended(
        status=process.returncode,
        output=output + "".join(answers),
        errors=[line for line in lines if line.startswith(("twla: error", "Traceback", "Exception"))],
        changes=counted[0][0] if counted else None,
        seconds=time.monotonic() - begun,
        need_room=tuple(counted[0][1:]) if counted else (),
    )


def ask(port: int) -> str:
    """Return what a server answers, or nothing if it goes away meanwhile."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        try:
            sent = json.dumps({"model": "out", **SERVED})
            connection.request("POST", "/v1/completions", sent, {"content-type": "application/json"})
            return json.loads(connection.getresponse().read())["choices"][0]["text"]
        except (OSError, http.client.HTTPException, ValueError):
            return ""


def make_case(
    name: str, model: Path, text: Path, work: Path, quantized: Path | None = None, forked: bool = False
) -> Case:
    """Make what the command needs, and return it.

    Args:
      name: of the command, as on the command line.
      model: Hugging Face folder.
      text: to calibrate on and to score.
      work: empty folder for all of it.
      quantized: folder that `twla quantize` wrote; None makes one of the model.
      forked: as `Case` takes it.
    """
    (work / "before").mkdir()
    for file, recipe in (("plain", RECIPE), ("refined", REFINED), ("integers", INTEGERS)):
        (work / f"{file}.toml").write_text(recipe)
    shutil.copytree(model, work / "model", copy_function=shutil.copyfile)
    (work / "model" / "chat_template.jinja").write_text(TEMPLATE)
    to, before = work / "to", work / "before"
    checks = ("--check-corpus", text, "--check-windows", 4)
    quantize = ("quantize", work / "model", to / "out", "--calibration", text, "--overwrite", *checks)
    reads, short = work / "out", ("--windows", 2, "--seq-len", 16)
    keeps_programs = name in ("generate", "chat", "serve")
    commands = {
        "quantize": (*quantize, "--recipe", work / "plain.toml"),
        "refine": (*quantize, "--recipe", work / "refined.toml"),
        "mesh": (*quantize, "--recipe", work / "plain.toml", "--mesh", "data=2"),
        "allocate": ("allocate", to / "out", "--budget", 5, *short, "--plot", to / "plot.png"),
        "compare": (
            *("compare", work / "model", "--recipes", f"{work / 'plain.toml'},{work / 'integers.toml'}"),
            *("--out", to / "out", "--corpus", text, "--calibration", text, "--seq-len", 16),
            *("--max-windows", 1, "--plot", to / "plot.png"),
        ),
        "report": ("report", reads, to / "page.html", "--overwrite"),
        "generate": ("generate", reads, "--prompt", "Once", "--max-new-tokens", 8),
        "chat": ("chat", reads, "--max-new-tokens", 8),
        "serve": ("serve", reads, "--port", 0, "--slots", 2, "--max-length", 64, "--grace", 5),
        **{f"export-{each}": ("export", reads, to / "dest", "--format", each) for each in ("hf", "gguf")},
    }
    first = (*quantize, "--recipe", work / "plain.toml", "--seed", 1)
    command = tuple(map(str, commands[name]))
    kept = {"keeps_programs": keeps_programs, "forked": forked}
    case = Case(command=command, to=to, before=before, asked="Once\n\nMore\n", **kept)
    if quantized is not None:
        shutil.copytree(quantized, work / "out")
    elif name != "compare":
        to.mkdir()
        ended = run(dataclasses.replace(case, command=tuple(map(str, first)), keeps_programs=False))
        assert ended.status == 0, ended.errors
        shutil.copytree(to / "out", work / "out")
    if name in ("quantize", "refine", "mesh", "allocate"):
        shutil.copytree(work / "out", before / "out")
    for file in {"allocate": ["plot.png"], "compare": ["plot.png"], "report": ["page.html"]}.get(name, ()):
        (before / file).write_text("of an earlier run")
    return case
