"""Fuzzes every reader, kills every command and loads the server, side by side, for so many seconds.

    python benchmarks/trust_all.py --model MODEL --text FILE --seconds 720 --processes 13 --out FOLDER

Needs the extras `fuzz` and `serve`. `summary.json` and `table.md` in FOLDER are written anew every ten seconds, so that
nothing is lost when the machine goes away. `fuzz/` holds inputs that ended in an error, with their tracebacks, `kill/`
a line of JSON for each attack, none of which is made again by a later run with the same FOLDER, `serve.txt` the
server's table.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = ("config", "tokenizer", "safetensors", "gguf", "metadata", "index", "manifest", "recipe", "text")
EVERY = "quantize:3,refine:2,allocate:3,compare:2,chat:1,serve:1"
COMMANDS = ("refine", "compare", "allocate", "quantize", "serve", "chat", "export-hf")


@dataclasses.dataclass(kw_only=True)
class Work:
    """A process, begun again when it ends before its time if it fuzzes.

    Attributes:
      name: of what it does, as its log is called.
      command: arguments after the interpreter.
      log: what it prints.
      nice: gives way to others.
    """

    name: str
    command: list[str]
    log: Path
    nice: int = 0
    process: subprocess.Popen | None = None

    def start(self) -> None:
        """Begin, and append to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["nice", "-n", str(self.nice), sys.executable, *self.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Return whether it is over."""
        return self.process is not None and self.process.poll() is not None

    def stop(self) -> None:
        """End it and what it started."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait()


def fuzzers(options: argparse.Namespace, left: float) -> list[Work]:
    """Return processes that fuzz, each with inputs of its own."""
    made = []
    for number in range(options.processes):
        target = TARGETS[number % len(TARGETS)]
        found = options.out / "inputs" / f"{target}-{number}"
        found.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={left:.0f}", "-print_final_stats=1", f"-seed={number + 1}", "-reload=0"]
        artifacts = f"-artifact_prefix={options.out / 'fuzz'}/{target}-"
        folders = [str(found), str(HERE / "fuzz_corpus" / target)]
        folders += [str(options.inputs / target)] * (options.inputs / target).is_dir()
        command = [str(HERE / "fuzz.py"), target, "--note", str(options.out / "fuzz"), *limits, artifacts]
        log = options.out / "logs" / f"fuzz-{target}-{number}.log"
        made.append(Work(name=target, command=[*command, *folders], log=log, nice=10))
    return made


def killers(options: argparse.Namespace, left: float) -> list[Work]:
    """Return processes that kill commands; the first one, alone, makes what the others begin with."""
    base = ["--fork", "--model", str(options.model), "--text", str(options.text)]
    base += ["--quantized", str(options.out / "quantized"), "--seconds", f"{left:.0f}"]
    first = [str(HERE / "kill.py"), "report", *base, "--times", "0"]
    made = [Work(name="first", command=first, log=options.out / "logs" / "first.log")]

    def add(name: str, kind: str, *arguments: object) -> None:
        results = options.out / "kill" / f"{name}.{kind}.jsonl"
        results.parent.mkdir(parents=True, exist_ok=True)
        command = [str(HERE / "kill.py"), name, *base, "--results", str(results), *map(str, arguments)]
        made.append(Work(name=name, command=command, log=options.out / "logs" / f"{name}.{kind}.log"))

    for seed in range(options.killers):
        for name in options.commands.split(","):
            times = options.times if options.moments is None else options.moments
            add(name, str(seed), "--times", options.times, "--moments", times, "--seed", seed)
    for name, _, processes in (each.partition(":") for each in filter(None, options.every.split(","))):
        for part in range(int(processes)):
            add(name, f"every-{part}", "--every", f"{part}/{processes}")
    return made


def summary(options: argparse.Namespace) -> dict:
    """Return what was counted until now."""
    tried: collections.Counter[str] = collections.Counter()
    for path in (options.out / "fuzz").glob("*.count"):
        tried[path.name.split(".")[0]] += int(path.read_text() or 0)
    errors = sorted(each.name for each in (options.out / "fuzz").glob("*.input"))
    ended = [
        each.name
        for each in (options.out / "fuzz").glob("*")
        if re.search("-(crash|timeout|oom)-", each.name)
    ]
    kills: dict[str, collections.Counter[str]] = {}
    wrong = []
    for path in sorted((options.out / "kill").glob("*.jsonl")):
        counts = kills.setdefault(path.name.split(".")[0], collections.Counter())
        log = options.out / "logs" / f"{path.stem}.log"
        for changes in re.findall(r"(\d+) changes, (\d+) need room", log.read_text(errors="replace")):
            counts["changes"], counts["need room"] = map(int, changes)
        for attack in map(json.loads, path.read_text().splitlines()):
            counts["at a change" if "last" in attack else "at a moment"] += 1
            counts[attack["how"]] += 1
            counts[f"found {attack['found']}"] += 1
            if attack["wrong"]:
                counts["wrong"] += 1
                wrong.append(f"{path.name}: {attack}")
    return {
        "seconds": round(time.monotonic() - options.begun),
        "fuzz": dict(tried),
        "executions": sum(tried.values()),
        "errors": errors,
        "ended": sorted(ended),
        "kills": {name: dict(counts) for name, counts in kills.items()},
        "wrong": wrong,
    }


def table(found: dict) -> str:
    """Return the counts as tables."""
    lines = [
        f"{found['seconds']} s, {found['executions']:,} executions",
        "",
        "| target | executions |",
        "|---|---|",
    ]
    lines += [f"| {name} | {count:,} |" for name, count in sorted(found["fuzz"].items())]
    lines += ["", *(f"error: {each}" for each in (*found["errors"], *found["ended"])), ""]
    columns = (
        "changes",
        "need room",
        "at a change",
        "at a moment",
        "SIGKILL",
        "SIGTERM",
        "SIGINT",
        "full disk",
        "wrong",
    )
    lines += [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, counts in found["kills"].items():
        lines.append(f"| {name} | {' | '.join(str(counts.get(each, 0)) for each in columns)} |")
    return "\n".join([*lines, "", *found["wrong"], ""])


def write(options: argparse.Namespace) -> None:
    """Write what was counted until now."""
    found = summary(options)
    for name, content in (("summary.json", json.dumps(found, indent=1)), ("table.md", table(found))):
        part = options.out / f".{name}"
        part.write_text(content)
        part.replace(options.out / name)


def main() -> None:
    """Run everything until the time is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, as small as can be")
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on and to score")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=720)
    parser.add_argument("--processes", type=int, default=13, help="that fuzz, and give way to the others")
    parser.add_argument(
        "--inputs", type=Path, default=Path("inputs"), help="more to begin with: a folder a target"
    )
    parser.add_argument("--killers", type=int, default=2, help="processes for each command")
    parser.add_argument(
        "--times", type=int, default=14, help="attacks of each at changes, and as many at moments"
    )
    parser.add_argument("--moments", type=int, help="attacks at moments, where they are more or fewer")
    parser.add_argument(
        "--every",
        default=EVERY,
        help="COMMAND:PROCESSES,…, killed at each change, on a full disk where it needs room",
    )
    parser.add_argument("--commands", default=",".join(COMMANDS), help="that are killed at some")
    parser.add_argument("--clients", type=int, default=256, help="of the server; 0 for none")
    parser.add_argument("--serve-seconds", type=float, default=600)
    options = parser.parse_args()
    options.begun = time.monotonic()
    options.out = options.out.absolute()
    (options.out / "fuzz").mkdir(parents=True, exist_ok=True)
    fuzzing = fuzzers(options, options.seconds)
    killing = killers(options, options.seconds - 60)
    load = [str(HERE / "serve_load.py"), str(options.model), "--clients", str(options.clients)]
    load += ["--seconds", str(options.serve_seconds)]
    serving = [Work(name="load", command=load, log=options.out / "serve.txt")] * bool(options.clients)
    for each in (*fuzzing, *serving, *killing[:1]):
        each.start()
    try:
        while (spent := time.monotonic() - options.begun) < options.seconds:
            time.sleep(min(10, options.seconds - spent))
            for each in fuzzing:
                if each.ended() and spent < options.seconds - 60:  # it crashed; the input is kept
                    each.start()
            if killing[0].ended():
                for each in killing[1:]:
                    if each.process is None:
                        each.start()
            write(options)
            if all(map(Work.ended, (*serving, *killing))) and not fuzzing:
                break
    finally:
        for each in (*fuzzing, *serving, *killing):
            each.stop()
        write(options)
        print((options.out / "table.md").read_text())
        for each in serving:
            print(each.log.read_text()[-3000:])


if __name__ == "__main__":
    main()
