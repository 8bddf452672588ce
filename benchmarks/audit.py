"""Asks for known vulnerabilities of every package that is needed here: `python benchmarks/audit.py [--extra NAME …]`.

pip-audit does so, in an environment of its own. One that is found ends it with status 1. Where no registry of
vulnerabilities can be reached, or it knows none of the packages, one line says so, and the status is 0.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from clean_install import environment
from dependencies import needed

TOOL = "pip-audit>=2.9,<3"


def verdict(status: int, output: str, errors: str) -> tuple[str, int]:
    """Return what to say of a run of pip-audit, and the exit status.

    Args:
      status: of pip-audit: 0 for no vulnerability, 1 for some or for an error.
      output: its JSON, nothing if it did not get so far.
      errors: what it wrote beside.
    """
    try:
        listed: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError):
        said = [line.strip() for line in errors.splitlines() if line.strip()] or [f"status {status}"]
        away = any(word in said[-1].lower() for word in ("connect", "timed out", "requests.exceptions"))
        why = "could not ask a registry of vulnerabilities" if away else "pip-audit failed"
        return f"{why}: {said[-1][:200]}", int(not away)
    asked = [each for each in listed if "skip_reason" not in each]
    if not asked:
        return f"could not ask a registry of vulnerabilities: it knows none of the {len(listed)} packages", 0
    found = [f"{each['name']} {each['version']}: {vuln['id']}" for each in asked for vuln in each["vulns"]]
    unknown = [each["name"] for each in listed if "skip_reason" in each]
    told = f"{len(asked)} packages asked about, {len(found)} known vulnerabilities"
    told += f"; not known there: {', '.join(unknown)}" if unknown else ""
    return "\n".join([*found, told]), int(bool(found))


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extra", nargs="*", default=[])
    parser.add_argument("--only", nargs="*", help="these packages alone")
    options = parser.parse_args()
    packages = [
        f"{name}=={held.version}\n"
        for name, held in needed(options.extra).items()
        if not options.only or name in options.only
    ]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "packages.txt").write_text("".join(packages))
        python = environment(work / "tool", TOOL)
        command = [python, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        command += ["--format", "json", "--requirement", work / "packages.txt"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    said, status = verdict(done.returncode, done.stdout, done.stderr)
    print(said)
    sys.exit(status)


if __name__ == "__main__":
    main()
