"""Lists what this package needs, as installed here, with versions and licences; on request as an SBOM.

    python benchmarks/dependencies.py [--extra serve …] [--sbom sbom.json]

The SBOM is CycloneDX 1.6 in JSON, which `pip-audit`'s and others' scanners read. A dependency without a licence in its
metadata, or with one of a kind that its users would have to look at, ends with exit status 1.
"""

import argparse
import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = "twla-jax"
PERMISSIVE = (
    "apache",
    "mit",
    "bsd",
    "isc",
    "python",
    "psf",
    "mpl",
    "zlib",
    "unlicense",
    "0bsd",
    "cc0",
    "hpnd",
)


def needed(extras: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Return every distribution that the package needs with these extras, by its normalised name."""
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting: list[tuple[str, str]] = [(ROOT, extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            held = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"{name}: is needed and not installed here")
        found[name] = held
        for line in held.requires or ():
            each = Requirement(line)
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                waiting += [(_normalised(each.name), one) for one in ("", *each.extras)]
    del found[ROOT]
    return dict(sorted(found.items()))


def licence(held: importlib.metadata.Distribution) -> str:
    """Return the licence that the metadata names: as an expression, by classifiers, or in words; empty for none."""
    metadata: Any = held.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    named = [
        each.rpartition("::")[2].strip()
        for each in metadata.get_all("Classifier", [])
        if "License ::" in each
    ]
    if named := [each for each in named if each != "OSI Approved"]:
        return " or ".join(named)
    words = (metadata.get("License") or "").strip()
    return words.splitlines()[0][:60] if words else ""


def sbom(found: dict[str, importlib.metadata.Distribution]) -> dict[str, Any]:
    """Return the list as a CycloneDX document."""
    components = [
        {
            "type": "library",
            "name": name,
            "version": held.version,
            "purl": f"pkg:pypi/{name}@{held.version}",
            "licenses": [{"license": {"name": licence(held) or "unknown"}}],
        }
        for name, held in found.items()
    ]
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components}


def main() -> None:
    """Print the table, and write the SBOM where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extra", nargs="*", default=[])
    parser.add_argument("--sbom", type=Path)
    options = parser.parse_args()
    found = needed(options.extra)
    if options.sbom:
        options.sbom.write_text(json.dumps(sbom(found), indent=2) + "\n")
    doubtful = []
    for name, held in found.items():
        said = licence(held)
        known = any(re.search(rf"\b{each}", said.lower()) for each in PERMISSIVE)
        doubtful += [] if known else [name]
        print(f"{name:24}{held.version:16}{said or 'none named'}{'' if known else '   <- look at it'}")
    print(f"{len(found)} packages; {len(doubtful)} to look at{': ' if doubtful else ''}{', '.join(doubtful)}")
    sys.exit(bool(doubtful))


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
