"""Kills a command where it writes and at random moments, and runs it again.

    python benchmarks/kill.py COMMAND --model MODEL --text FILE --times 24
    python benchmarks/kill.py COMMAND --model MODEL --text FILE --every 0/1 --results FILE.jsonl

COMMAND is quantize, refine (a quantisation that refines), mesh (one on two devices), allocate, compare, report,
generate, chat, serve, export-hf or export-gguf. Half of the attacks come just before a change of the file system, drawn
from all that a run makes: a signal, or a disk that is full from there on. The others are signals at random moments.
`--every` attacks at each change instead. After each attack every file and folder must be the old one or the new one;
then the command runs again, and must leave the same bytes as a run that nothing disturbed (but for seconds and memory
in reports) and no other file. It ends with a table, and fails otherwise.
"""

import argparse
import collections
import hashlib
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kill_fork

from kill_cases import FULL, Case, Ended, make_case, run

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
SPENT = {"seconds", "peak_memory", "peak_memory_by_phase", "checksum"}  # what no two runs share


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder by its name, without what no two runs share."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name in ("report.json", "ila_amp.json", "twla.json"):
                data = json.dumps(plain(json.loads(data)), sort_keys=True).encode()
            elif path.name == "compare.json":  # whose keys are made from checksums of reports
                data = json.dumps(
                    sorted(each["nll"] for each in json.loads(data)["scores"].values())
                ).encode()
            elif path.name.endswith(("-cache", "-atime")):  # programs hold the time that compiling them took
                data = b""
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def plain(value: Any) -> Any:
    """Return JSON without seconds, memory, and the checksums of files that hold these."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    left_out = SPENT | {"report.json", "ila_amp.json"}
    return {name: plain(each) for name, each in value.items() if name not in left_out}


def units(found: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return the files by what appears at once: a folder of a model or a file; nothing hidden or unfinished."""
    roots = sorted(name.rpartition("/")[0] for name in found if name.endswith(("twla.json", "config.json")))
    parts: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name, digest in found.items():
        if not re.search(r"(^|/)\.|\.(partial|allocate)/", name) and not name.startswith("cache/"):
            inside = [root for root in roots if name.startswith(f"{root}/")]
            parts[inside[0] if inside else name][name] = digest
    return parts


def state(found: dict[str, str], old: dict[str, str], new: dict[str, str]) -> str:
    """Return whether all is old, all new, or some of both; "mixed" if a unit is neither, which may not be."""
    seen = set()
    parts, before, whole = units(found), units(old), units(new)
    for name in parts.keys() | before.keys() | whole.keys():
        here = parts.get(name, {})
        if before.get(name, {}) == whole.get(name, {}) == here:
            continue
        if name.endswith("compare.json") and here:  # grows with every score
            seen.add("some of both")
        elif here in (before.get(name, {}), whole.get(name, {})):
            seen.add("old" if here == before.get(name, {}) else "new")
        else:
            return "mixed"
    return seen.pop() if len(seen) == 1 else "some of both" if seen else "old"


def restore(case: Case) -> None:
    """Make the place as it was before the command."""
    shutil.rmtree(case.to, ignore_errors=True)
    shutil.copytree(case.before, case.to)


def attack(
    case: Case, whole: Ended, new: dict[str, str], twice: dict[str, str], **how: Any
) -> tuple[str, list[str]]:
    """Return what was found after one attack and what was wrong with it and with the next run.

    `twice` is what a second run leaves of `new`.
    """
    restore(case)
    old, ended = contents(case.to), run(case, **how)
    found, wrong = state(contents(case.to), old, new), []
    if found == "mixed":
        wrong.append("neither the old nor the new contents")
    if any(not line.startswith("twla: error") for line in ended.errors) or len(ended.errors) > 1:
        wrong.append(f"no message of one line: {ended.errors}")
    allowed = {"SIGKILL": {-9}, "SIGTERM": {-15}, "SIGINT": {130, -2}, FULL: {1}}[how["how"]]
    if ended.status not in allowed | {whole.status} | ({0} if case.keeps_programs else set()):
        wrong.append(f"status {ended.status}")
    exports = case.command[0] == "export" and found == "new"  # what is there is not written again
    again = None if exports else run(case)
    left = contents(case.to)
    said = case.keeps_programs and again is not None and again.output != whole.output  # others print seconds
    if said or (again is not None and again.status != whole.status):
        wrong.append(f"the next run: status {again.status}, {again.errors}")
    hidden = {name for name in left if exports and Path(name).name.startswith(".")}
    right = twice if found == "new" else new
    differs = {name for name in right.keys() | left.keys() if right.get(name) != left.get(name)} - hidden
    if differs:
        wrong.append(f"other bytes after the next run: {sorted(differs)[:6]}")
    if ended.status == whole.status and how["how"] != "SIGTERM":
        found = "ended before"
    return found, wrong


def attacks(
    case: Case,
    times: int,
    moments: int,
    seed: int = 0,
    seconds: float = float("inf"),
    every: slice | None = None,
    results: Path | None = None,
) -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """Return how often what was found after each kind of attack, and what was wrong.

    Args:
      case: what is run.
      times: attacks at changes of the file system.
      moments: attacks at random moments.
      seed: of changes and moments.
      seconds: no further attack begins when so many are over.
      every: instead of all these, a signal at these of all changes, and a full disk at these of those that need room.
      results: a line of JSON for each attack is added to this file; those at changes that it has, and that were
        right, are not made again.
    """
    begun = time.monotonic()
    if not case.keeps_programs and case.command[0] != "export":
        restore(case)
        run(case)  # keeps compiled programs, so that the next run takes as long as those that are attacked
    restore(case)
    whole = run(case)
    new, chance = contents(case.to), random.Random(seed)
    if case.command[0] == "allocate":  # begins with the bits that the first run chose, and says so
        run(case)
    twice = contents(case.to)
    assert whole.changes, whole.errors
    assert whole.status in (0, -signal.SIGTERM), whole.errors
    print(
        f"{whole.changes} changes, {len(whole.need_room)} need room, {whole.seconds:.1f} s", file=sys.stderr
    )
    kinds = (*SIGNALS, FULL)
    changes = [chance.sample(range(whole.changes), whole.changes) for _ in kinds]
    chosen = [{"how": kinds[i % 4], "last": changes[i % 4][i // 4 % whole.changes]} for i in range(times)]
    chosen += [{"how": SIGNALS[i % 3], "after": chance.uniform(0, whole.seconds)} for i in range(moments)]
    if every is not None:
        chosen = [{"how": SIGNALS[i % 3], "last": i} for i in range(whole.changes)[every]]
        chosen += [{"how": FULL, "last": change} for change in whole.need_room[every]]
    lines = results.read_text().splitlines() if results and results.exists() else []
    right = [each for each in map(json.loads, lines) if not each["wrong"]]  # a fault is tried again
    made = {(each["how"], each.get("last"), each.get("after")) for each in right}
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    wrong = []
    for how in sorted(chosen, key=lambda _: chance.random()):
        if time.monotonic() - begun > seconds:
            break
        if (how["how"], how.get("last"), how.get("after")) in made:
            continue
        found, faults = attack(case, whole, new, twice, **how)
        counts[f"{how['how']}, {'at a change' if 'last' in how else 'at a moment'}"][found] += 1
        wrong += [f"{how}: {fault}" for fault in faults]
        line = json.dumps({**how, "found": found, "wrong": faults})
        print(line, file=sys.stderr, flush=True)
        if results:
            with results.open("a") as file:
                file.write(f"{line}\n")
    return counts, wrong


def main() -> None:
    """Attack the command that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, as small as can be")
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on and to score")
    parser.add_argument(
        "--quantized", type=Path, help="keeps the quantised model for other runs of this script"
    )
    parser.add_argument("--times", type=int, default=12, help="attacks at changes, and as many at moments")
    parser.add_argument("--moments", type=int, help="attacks at moments, where they are more or fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no attack begins later")
    parser.add_argument(
        "--fork", action="store_true", help="begin with the libraries imported: in half the time"
    )
    parser.add_argument(
        "--every",
        help="I/N: a signal at every N-th change from the I-th on, a full disk where it needs room, and no more",
    )
    parser.add_argument("--results", type=Path, help="keeps attacks, which are not made again")
    options = parser.parse_args()
    if options.fork:
        kill_fork.import_libraries()
    work = Path(tempfile.mkdtemp())
    try:
        made = options.quantized if options.quantized and options.quantized.is_dir() else None
        given = options.model.resolve(), options.text.resolve()
        case = make_case(options.command, *given, work, made, options.fork)
        if options.quantized and made is None:
            shutil.copytree(work / "out", options.quantized)
        every = None
        if options.every:
            first, _, step = options.every.partition("/")
            every = slice(int(first), None, int(step))
        limits = {"seed": options.seed, "seconds": options.seconds}
        moments = options.times if options.moments is None else options.moments
        counts, wrong = attacks(case, options.times, moments, every=every, results=options.results, **limits)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    columns = ("old", "some of both", "new", "ended before", "mixed")
    print(f"\n| {options.command} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for kind, found in counts.items():
        print(f"| {kind} | {' | '.join(str(found[each]) for each in columns)} |")
    print(
        f"\n{sum(map(collections.Counter.total, counts.values()))} attacks, {len(wrong)} wrong",
        *wrong,
        sep="\n",
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
