"""Compares a quantised model's perplexity through the kernels with the reference's: `check_perplexity.py OUT`.

OUT is a folder that twla wrote. Everything computes in bf16, as the kernels do: the quantiser's own arithmetic, packed
weights through the XLA reference, and packed weights through this device's kernels. Exits with 1 if the last two differ
by more than 0.1 % at any of the bits.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

import twla_jax
from twla_jax import xla_flags
from twla_jax.inference import execution
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.jobs import loading
from twla_jax.models import sites
from twla_jax.models.decoder import Decoder
from twla_jax.text import corpora

TOLERANCE = 1e-3
OWN, REFERENCE, KERNELS = "own arithmetic", "packed, XLA reference", "packed, kernels"


def compare(model: Decoder, tokens: np.ndarray, bits: int, **settings) -> dict[str, float]:
    """Perplexity by path at these activation bits; `settings` go to `evaluate`."""
    model = jax.tree.map(jnp.asarray, sites.set_activation_bits(model, bits))
    forms = {
        OWN: lambda: model,
        REFERENCE: lambda: prepare_for_inference(model, implementation="xla"),
        KERNELS: lambda: prepare_for_inference(model, unpack=False),
    }
    found = {}
    for name, form in forms.items():
        found[name] = twla_jax.evaluate(form(), tokens, progress=False, **settings)["perplexity"]
        print(f"A{bits}, {name}: {found[name]:.4f}", flush=True)
    return found


def difference(found: dict[str, float]) -> float:
    """Relative difference between kernels and reference."""
    return abs(found[KERNELS] / found[REFERENCE] - 1)


def main() -> None:
    """Reads the command line, prints a line a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--corpus", default="wikitext2")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    options = parser.parse_args()
    xla_flags.disable_triton_gemm()
    model, tokenizer = loading.load(options.out, dtype=jnp.bfloat16)
    text = corpora.load_corpus(options.corpus, "evaluation")
    tokens = corpora.tokenize(text, tokenizer, model.config.vocab_size)
    print(f"{execution.path()}; {options.windows} windows of {options.seq_len}")
    settings = {"seq_len": options.seq_len, "max_windows": options.windows}
    found = {bits: difference(compare(model, tokens, bits, **settings)) for bits in options.bits}
    for bits, error in found.items():
        print(f"A{bits}: kernels differ from the reference by {error:.4%}")
    sys.exit(max(found.values()) > TOLERANCE)


if __name__ == "__main__":
    main()
