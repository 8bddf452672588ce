"""Times the choice of a token: what each rule of `Sampling` adds to a decoding step, on random logits.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --vocabulary 128256 --batches 1 8 64

Checks first that the rules leave as many tokens as they should. A step of a 7B model takes about a millisecond on a
Hopper GPU, by which the last column is to be read.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.inference.sampling import Sampling, choose, keep_likely

RULES = {
    "likeliest": Sampling(),
    "temperature": Sampling(temperature=0.7),
    "top-k": Sampling(temperature=0.7, top_k=40),
    "top-p": Sampling(temperature=0.7, top_p=0.9),
    "min-p": Sampling(temperature=0.7, min_p=0.05),
    "penalty": Sampling(repetition_penalty=1.1),
    "all": Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
}
STEPS = 200


def check(logits):
    """By sorting in numpy: top-k keeps k tokens, top-p the fewest that add up to p."""
    kept = np.isfinite(np.asarray(keep_likely(logits, top_k=jnp.int32(40)))).sum(1)
    assert (kept == 40).all(), kept
    likely = np.sort(np.asarray(jax.nn.softmax(logits), np.float64), axis=1)[:, ::-1]
    fewest = (np.cumsum(likely, axis=1) < 0.9).sum(1) + 1
    kept = np.isfinite(np.asarray(keep_likely(logits, top_p=jnp.float32(0.9)))).sum(1)
    assert (abs(kept - fewest) <= 2).all(), (kept, fewest)  # sums in float32


def seconds(logits, sampling):
    """The median time of one choice, in a loop on the device that depends on the token before."""
    seen = sampling.seen(np.zeros((len(logits), 1), np.int64), logits.shape[1])
    seen = None if seen is None else jnp.asarray(seen)

    @jax.jit
    def run(logits, sampler, key):
        def step(i, token):
            return choose(logits + token[:, None] * 1e-9, sampler, seen, jax.random.fold_in(key, i))

        return jax.lax.fori_loop(0, STEPS, step, jnp.zeros(len(logits), jnp.int32))

    arguments = logits, sampling.sampler(), jax.random.key(0)
    run(*arguments).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run(*arguments).block_until_ready()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / STEPS


def main():
    """Print a table of microseconds a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    options = parser.parse_args()
    lines = ["| rule | " + " | ".join(f"{batch} rows, µs" for batch in options.batches) + " |"]
    lines.append("|---" * (len(options.batches) + 1) + "|")
    logits = {
        batch: 3 * jax.random.normal(jax.random.key(batch), (batch, options.vocabulary))
        for batch in options.batches
    }
    check(logits[min(options.batches)])
    for name, sampling in RULES.items():
        times = [f"{1e6 * seconds(logits[batch], sampling):.1f}" for batch in options.batches]
        lines.append(f"| {name} | {' | '.join(times)} |")
    print(f"{jax.devices()[0].device_kind}, vocabulary {options.vocabulary}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
