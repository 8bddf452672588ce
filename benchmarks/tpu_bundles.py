"""Counts cycles in the TPU compiler's final bundles, as libtpu writes them with `--xla_jf_dump_llo_text`.

A bundle is what a core issues in one cycle. A line of the file is a bundle: its address, a label, one `>` for every
loop that it is in, and its instructions. What waits for memory is not counted.
"""

import dataclasses
import re

_LINE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(L[HBE]|P[BF]|CT)? *: *(>*) *(\{.*)")
_EXIT = re.compile(r"%(p\d+)\S* = scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")
_FORWARD = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_BACK = re.compile(r"sbr\.rel \(!%(p\d+)\S*\) target")
_DELAY = 4  # bundles behind a branch that run in any case
_PIPELINE = 2  # trips of a grid's loop that only load first blocks or store last ones
_MULTIPLY = "vmatmul"


@dataclasses.dataclass
class Loop:
    """Holds the bundles of a loop, those of the loops in it apart; the outermost one is the program."""

    parts: list["str | Loop"] = dataclasses.field(default_factory=list)
    trips: int | None = 1  # None where only the running program knows

    def cycles(self, *, grid: bool = False) -> int:
        """Return the bundles of all trips, every branch taken to be run, but for a grid's body in its extra trips.

        Args:
          grid: the loop is that of a kernel's grid.
        """
        body = self._body() if grid else range(0)
        total = 0
        for index, part in enumerate(self.parts):
            trips = (self.trips or 1) - (_PIPELINE if index in body else 0)
            total += trips * (1 if isinstance(part, str) else part.cycles())
        return total

    def has(self, name: str) -> bool:
        """Return whether an instruction of this name is in it."""
        return any(name in part if isinstance(part, str) else part.has(name) for part in self.parts)

    def unknown(self) -> bool:
        """Return whether the trips of a loop are not in the text."""
        return self.trips is None or any(part.unknown() for part in self.parts if isinstance(part, Loop))

    def _body(self) -> range:
        """Return the places of what a branch skips in the first and last trips: the widest one that multiplies."""
        widest = range(0)
        for index, part in enumerate(self.parts):
            found = _FORWARD.search(part) if isinstance(part, str) else None
            if found is None:
                continue
            ends = re.compile(rf"(?:Start|empty) region {found[1]}\b")
            for end in range(index + 1, len(self.parts)):
                line = self.parts[end]
                if isinstance(line, str) and ends.search(line):
                    skipped = range(index + 1 + _DELAY, end)
                    if len(skipped) > len(widest) and Loop(self.parts[skipped.start : end]).has(_MULTIPLY):
                        widest = skipped
                    break
        return widest


def program(text: str) -> Loop:
    """Return the loops of a file of final bundles."""
    stack, exits, ends = [Loop()], {}, {}
    for index, (label, depth, bundle) in enumerate(_bundles(text)):
        if label == "LB":
            del stack[depth:]
            stack.append(Loop(trips=None))
            stack[-2].parts.append(stack[-1])
        stack[-1].parts.append(bundle)
        exits |= {name: int(trips) for name, trips in _EXIT.findall(bundle)}
        back = _BACK.search(bundle)
        if back and back[1] in exits and len(stack) > 1:
            del stack[max(depth, 1) + 1 :]
            stack[-1].trips = exits.pop(back[1])
            ends[index + _DELAY] = len(stack) - 1
        if index in ends:
            del stack[ends[index] :]
    return stack[0]


def cycles(text: str, *, lenient: bool = False) -> int:
    """Return the cycles of a program, from its final bundles.

    Args:
      text: of the file.
      lenient: count loops once if their trips are known only when they run.

    Raises:
      ValueError: the trips of a loop are not a constant, and that is not allowed.
    """
    outermost = program(text)
    if not lenient and outermost.unknown():
        raise ValueError("the trips of a loop are not a constant")
    return sum(
        1 if isinstance(part, str) else part.cycles(grid=part.has(_MULTIPLY)) for part in outermost.parts
    )


def _bundles(text: str) -> list[tuple[str, int, str]]:
    """Return each bundle's label, the number of loops that it is in, and its instructions."""
    found: list[tuple[str, int, str]] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            found.append((match[1] or "", len(match[2]), match[3]))
        elif found:
            label, depth, bundle = found[-1]
            found[-1] = (label, depth, bundle + line)
    return found
