"""Says how many lines of the readers the inputs of the fuzz corpus reach, and takes inputs into it that reach more.

    python benchmarks/fuzz_coverage.py
    python benchmarks/fuzz_coverage.py --take FOLDER

FOLDER has a folder a target, as `fuzz.py` fills them. Of its inputs, those are copied that reach a line which no other
input of the corpus does, the shortest ones. Lines are those inside of functions. Needs Python 3.12.
"""

import argparse
import hashlib
import importlib.util
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import fuzz

Line = tuple[str, int]
TOOL = sys.monitoring.COVERAGE_ID


def readers() -> set[str]:
    """Return the files whose lines count: of the modules that the fuzzer watches, and of what is inside packages."""
    found = set()
    for name in fuzz._WATCHED:
        path = Path(importlib.util.find_spec(name).origin)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
        found |= set(map(str, path.parent.glob("*.py") if path.name == "__init__.py" else [path]))
    return found


def lines(code: types.CodeType) -> Iterator[Line]:
    """Yield the lines of every function in a module's code."""
    for inside in code.co_consts:
        if isinstance(inside, types.CodeType):
            yield from (
                (inside.co_filename, line) for *_, line in inside.co_lines() if line and inside.co_flags & 1
            )
            yield from lines(inside)


def watch(files: set[str]) -> set[Line]:
    """Return a set that every line of these files comes into when it runs."""
    reached: set[Line] = set()

    def run(code: types.CodeType, line: int) -> object:
        if code.co_filename in files:
            reached.add((code.co_filename, line))
        return sys.monitoring.DISABLE

    sys.monitoring.use_tool_id(TOOL, "fuzz_coverage")
    sys.monitoring.register_callback(TOOL, sys.monitoring.events.LINE, run)
    return reached


def reach(target: str, paths: Iterable[Path], reached: set[Line], inside: set[Line]) -> dict[Path, set[Line]]:
    """Return which lines each input reaches, of those inside of functions."""
    found = {}
    sys.monitoring.set_events(TOOL, sys.monitoring.events.LINE)
    for path in paths:
        reached.clear()
        sys.monitoring.restart_events()
        fuzz.run(target, path.read_bytes())
        found[path] = reached & inside
    sys.monitoring.set_events(TOOL, 0)
    return found


def needed(found: dict[Path, set[Line]], known: set[Line]) -> list[Path]:
    """Return inputs that reach together what all reach beyond `known`, the shortest ones first."""
    taken: list[Path] = []
    reached = set(known)
    for path in sorted(found, key=lambda path: path.stat().st_size):
        if found[path] - reached:
            taken.append(path)
            reached |= found[path]
    for path in list(taken):  # later ones may reach all that an earlier one did
        others = set().union(known, *(found[other] for other in taken if other != path))
        if reached <= others:
            taken.remove(path)
    return taken


def main() -> None:
    """Print a table, and take inputs before that."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--take", type=Path, action="append", default=[], help="folder with a folder a target"
    )
    options = parser.parse_args()
    files, together = readers(), set()
    inside = {
        line
        for name in files
        for line in lines(compile(Path(name).read_text(encoding="utf-8"), name, "exec"))
    }
    for target in fuzz.TARGETS:
        fuzz.run(target, b"{}")
    fuzz._repeat_nothing()
    reached = watch(files)
    print("| | inputs | bytes | lines |\n|---|---|---|---|")
    for target in fuzz.TARGETS:
        folder = fuzz.CORPUS / target
        kept = reach(target, sorted(folder.iterdir()), reached, inside)
        more = sorted(path for taken in options.take for path in (taken / target).glob("*") if path.is_file())
        found, known = reach(target, more, reached, inside), set().union(*kept.values())
        for path in needed(found, known):
            data = path.read_bytes()
            kept[folder / f"found-{hashlib.sha256(data).hexdigest()[:8]}"] = found[path]
            (folder / f"found-{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)
        here = set().union(*kept.values())
        together |= here
        size = sum(path.stat().st_size for path in kept)
        print(f"| {target} | {len(kept)} | {size:,} | {len(here):,} |", flush=True)
    sys.monitoring.free_tool_id(TOOL)
    print(f"\n{len(together):,} of {len(inside):,} lines in {len(files)} files")


if __name__ == "__main__":
    main()
