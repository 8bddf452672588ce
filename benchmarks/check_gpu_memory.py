"""Quantises on a GPU with too little memory, again and again with more of it: `check_gpu_memory.py MODEL TEXT`.

MODEL is a small Hugging Face folder, TEXT a file to calibrate on. Without enough memory the command must end with one
line that names a setting, and leave no OUT. With enough it must go on from what is finished, and leave the same bytes
as a run that nothing disturbed (but for seconds and memory in reports). It ends with a table, and fails otherwise.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kill import contents

RECIPE = """
rotation.steps = 2
activations.clip_tokens = 64
calibration = {windows = 256, seq_len = 512}
weights = {group_size = 16, ternary.rounds = 1}
"""
FRACTIONS = [0.0005 * 2**power for power in range(11)]  # of the memory


def quantize(options: argparse.Namespace, work: Path, name: str, fraction: float) -> tuple[int, str]:
    """Return the exit status and the errors of a quantisation that may take this part of the memory."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_gpu_deterministic_ops=true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(fraction),
        "TWLA_COMPILATION_CACHE": str(work / "cache"),
    }
    command = [sys.executable, "-m", "twla_jax", "quantize", str(options.model), str(work / name)]
    command += [
        "--recipe",
        str(work / "recipe.toml"),
        "--calibration",
        str(options.text),
        "--check-corpus",
        str(options.text),
        "--check-windows",
        "2",
    ]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    return ended.returncode, ended.stderr


def main() -> None:
    """Print a line for each part of the memory, and whether the bytes are the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    wrong = []
    try:
        (work / "recipe.toml").write_text(RECIPE)
        status, errors = quantize(options, work, "whole", 0.5)
        assert status == 0, errors[-2000:]
        print("| of the memory | status | finished parts kept | message |\n|---|---|---|---|")
        for fraction in FRACTIONS:
            status, errors = quantize(options, work, "out", fraction)
            said = [line for line in errors.splitlines() if line.startswith(("twla: error", "Traceback"))]
            kept = sum(path.is_file() for path in (work / "out.partial").rglob("*"))
            print(f"| {fraction:.2%} | {status} | {kept} | {' '.join(said)[:400]} |", flush=True)
            if status == 0:
                break
            if status != 1 or len(said) != 1 or "the memory does not suffice" not in said[0]:
                wrong.append(f"{fraction:.2%}: {errors[-1500:]}")
            if (work / "out").exists():
                wrong.append(f"{fraction:.2%}: OUT is there")
        same = status == 0 and contents(work / "whole") == contents(work / "out")
        print(f"\nthe same bytes as undisturbed: {same}", *wrong, sep="\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(bool(wrong) or not same)


if __name__ == "__main__":
    main()
