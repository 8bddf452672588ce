"""Times decoding on a CPU in every form a model may take, in turns: `cpu_decode.py MODEL OUT`.

MODEL is an original and OUT a folder that twla made of it. Forms are those of `--kernels`: `off` is the quantiser's own
arithmetic, which unpacks each matrix where it is used, `on` the kernels' layout through the XLA reference, and `auto`
what twla takes by itself. Prints tokens a second, the best of several rounds, and the seconds of the first one, which
compiles.

`--llama FILE.gguf` adds llama.cpp, in turns with the others. `--llama-python` names the interpreter that has
llama-cpp-python, where this one has not. Its eight prompt tokens are counted in the time, as everybody's are.

Everybody has a thread for each core that the process may use. llama.cpp's threads wait for each other without giving
theirs up: where other work takes a core it becomes many times slower, and `taskset -c 0` in front compares one thread.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import twla_jax
from twla_jax.inference import execution
from twla_jax.jobs import loading
from twla_jax.models import sites

# (which model, --kernels, activation bits)
FORMS = (
    ("MODEL", "off", 16),
    ("MODEL", "auto", 16),
    ("OUT", "off", 16),
    ("OUT", "on", 16),
    ("OUT", "auto", 16),
    ("OUT", "auto", 8),
    ("OUT", "auto", 4),
)

# Runs beside this process: for each number of tokens on a line of stdin, generates as many and prints the seconds.
LLAMA = """
import sys, time, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[2]), verbose=False)
print(flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    model.reset()
    tokens = model.generate([1] * 8, top_k=1, temp=0.0)
    for _ in range(int(line)):
        next(tokens)
    print(time.perf_counter() - start, flush=True)
"""


def llama(file: str, python: str, threads: int) -> Callable[[int], float]:
    """Returns a function that generates so many tokens with llama.cpp and returns the seconds that it took."""
    command = [python, "-c", LLAMA, file, str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    asked, told = process.stdin, process.stdout
    assert asked is not None
    assert told is not None
    if not told.readline():
        sys.exit(f"{python} cannot load {file} with llama-cpp-python")

    def generate(tokens: int) -> float:
        print(tokens, file=asked, flush=True)
        return float(told.readline())

    return generate


def main() -> None:
    """Reads the command line, prints a row a form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=3.0, help="after which no other round begins")
    parser.add_argument("--only", default="off,on,auto", help="values of --kernels, with commas between them")
    parser.add_argument("--llama", metavar="FILE.gguf")
    parser.add_argument("--llama-python", default=sys.executable)
    options = parser.parse_args()
    threads, begun = len(os.sched_getaffinity(0)), time.monotonic()
    theirs = llama(options.llama, options.llama_python, threads) if options.llama else None
    theirs_seconds = []
    models = {"MODEL": loading.load(options.model)[0], "OUT": loading.load(options.out)[0]}
    forms = [form for form in FORMS if form[1] in options.only.split(",")]
    seconds = {form: [] for form in forms}
    prepared = {}
    for name, kernels, bits in forms:
        model = models[name] if name == "MODEL" else sites.set_activation_bits(models[name], bits)
        form, path = execution.for_inference(model, kernels)
        prepared[name, kernels, bits] = jax.tree.map(jnp.asarray, form), path
    for index in range(1 + options.rounds):
        if index > 1 and time.monotonic() - begun > 60 * options.minutes:
            break
        for form, (model, _) in prepared.items():
            start = time.perf_counter()
            prompt = np.full((1, 8), 1, np.int32)
            twla_jax.generate(model, prompt, max_new_tokens=options.tokens, eos_token_ids=())
            seconds[form].append(time.perf_counter() - start)
        if theirs:
            theirs_seconds.append(theirs(options.tokens))
    for form, (first, *rest) in seconds.items():
        name, kernels, bits = form
        rate, path = options.tokens / min(rest), prepared[form][1]
        print(f"{name:<6} {kernels:<5} A{bits:<3} {rate:7.1f} tokens/s   first {first:5.1f} s   {path}")
    if theirs:
        first, *rest = theirs_seconds
        rate = options.tokens / min(rest)
        print(
            f"GGUF               {rate:7.1f} tokens/s   first {first:5.1f} s   llama.cpp, {threads} threads"
        )


if __name__ == "__main__":
    main()
