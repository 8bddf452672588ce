"""Changes JSON as JSON for `fuzz.py`: of random bytes hardly any would get past the parser."""

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

ODD = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        8,
        4,
        16,
        2**31,
        2**63,
        10**40,
        0.0,
        0.5,
        -1.5,
        1e-45,
        1e308,
        1e400,
    ),
    *(
        "",
        "a",
        "0",
        "../a",
        "a\nb",
        "\0",
        "\ud800",
        "é" * 50,
        [],
        [0],
        [[]],
        {},
        {"": 0},
        [None] * 3,
        [1.0] * 40,
    ),
)


def mutator(
    known: Sequence[Any], plain: Callable[[bytes, int], bytes], skipped: int = 0
) -> Callable[[bytes, int, int], bytes]:
    """Return a mutator as atheris takes it, of JSON, alone or inside something else.

    Args:
      known: JSON whose keys and values are worth trying, and which it may begin with.
      plain: changes bytes; takes them and the most there may be.
      skipped: bytes before the JSON; 8 are its length, as of a safetensors file's header, and data comes behind it.
    """

    pool = [place for each in known for place in places(each)]
    chance = random.Random()

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance.seed(seed)
        before, head, tail = data[:skipped], data[skipped:], b""
        if len(before) == 8:
            (size,) = struct.unpack("<Q", before)
            head, tail = data[8 : 8 + size], data[8 + size :]
        try:
            value = json.loads(head)
        except (ValueError, RecursionError):
            value = None
        if value is None or chance.random() < 0.1:
            return plain(data, most)
        if chance.random() < 0.05:
            value = chance.choice(known)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            value = changed(value, pool, chance)
        head = json.dumps(value).encode("utf-8", "surrogatepass")
        before = struct.pack("<Q", len(head)) if skipped == 8 else before
        return (before + head + tail)[:most]

    return mutate


def places(value: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Return every value inside JSON with the keys that lead to it."""
    found: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    for way, each in found:  # which grows meanwhile
        if isinstance(each, dict):
            found += [((*way, key), inside) for key, inside in each.items()]
        elif isinstance(each, list):
            found += [((*way, key), inside) for key, inside in enumerate(each)]
    return found


def changed(value: Any, pool: list[tuple[tuple[Any, ...], Any]], chance: random.Random) -> Any:
    """Return JSON with one value changed, added or removed; half the time where another of `pool` lies."""
    way, other = chance.choice(pool)
    if chance.random() < 0.5:
        way, _ = chance.choice(places(value))
    new = chance.choice((other, chance.choice(ODD), chance.choice(pool)[1]))
    return _put(value, way, new, chance)


def _put(value: Any, way: tuple[Any, ...], new: Any, chance: random.Random) -> Any:
    if not way:
        return _near(value, new, chance)
    key, *rest = way
    if isinstance(value, list) and isinstance(key, int):
        copy = list(value)
        index = min(key, len(copy))
        if not rest and chance.random() < 0.3:
            return copy[:index] + copy[index + 1 :]
        return [
            *copy[:index],
            _put(copy[index] if index < len(copy) else None, tuple(rest), new, chance),
            *copy[index + 1 :],
        ]
    copy = dict(value) if isinstance(value, dict) else {}
    if not rest and chance.random() < 0.2:
        copy.pop(key, None)
        return copy
    copy[str(key)] = _put(copy.get(str(key)), tuple(rest), new, chance)
    return copy


def _near(value: Any, new: Any, chance: random.Random) -> Any:
    """Return another value: a number or text near the old one as often as a new one."""
    if chance.random() < 0.5:
        return new
    if isinstance(value, int | float) and not isinstance(value, bool):
        return chance.choice(
            (value + 1, value - 1, -value, value * 2, float(value) if abs(value) < 1e300 else 0)
        )
    if isinstance(value, str) and value:
        index = chance.randrange(len(value))
        return chance.choice(
            (value[:index], value + value, value[:index] + chance.choice("{}/.:0 \n") + value[index:])
        )
    if isinstance(value, list):
        return chance.choice((value + value, value[:-1], [*value, new]))
    return new
