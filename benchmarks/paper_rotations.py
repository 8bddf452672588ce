"""What the published layout loses to rotations that linears share: one for each input, beside one for each linear.

    TWLA_DATA=… python benchmarks/paper_rotations.py smollm2

The public code rotates and quantises the input of q, k and v three times. This library does so once. Here a block is
declared with an input of its own for every linear, quantised by the same recipe and scored at the same bits.
TWLA_SMOLLM2 may name the GGUF file that `smollm2` stands for.
"""

import argparse
import dataclasses
import os
import sys
import time
from typing import Any

import jax.numpy as jnp
from flax import nnx

from twla_jax import recipe, xla_flags
from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import evaluate
from twla_jax.jobs import loading
from twla_jax.models.blocks import Context, Site, State
from twla_jax.models.decoder import Decoder, computing_in
from twla_jax.models.families import FAMILIES
from twla_jax.models.families.llama import LlamaBlock
from twla_jax.models.layers import InputTransform, replace
from twla_jax.models.sites import set_activation_bits
from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.ops.attention.reference import attention
from twla_jax.quantization import pipeline
from twla_jax.text import corpora
from twla_jax.text.windows import calibration_windows


class ByLinear(LlamaBlock):
    """A Llama block in which every linear has an input of its own; for whole sequences."""

    sites = (
        Site("q", ("q",), norm="input_norm"),
        Site("k", ("k",), norm="input_norm"),
        Site("v", ("v",), norm="input_norm"),
        Site("o", ("o",), writes=True),
        Site("gate", ("gate",), norm="post_norm"),
        Site("up", ("up",), norm="post_norm"),
        Site("down", ("down",), writes=True),
    )

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        for site in self.sites:
            setattr(self, f"{site.name}_input", InputTransform())

    def before(self, site: Site, state: State, context: Context) -> Any:
        """Return what the linear of `site` reads, before its transform."""
        return state.inner if site.norm is None else getattr(self, site.norm)(state.x)

    def after(self, site: Site, state: State, h: Any, context: Context) -> State:
        """Return the state once the linear of `site` has run on h; outputs wait in `inner` for those beside them."""
        if site.writes:
            return State(self.add_output(site, h, state.x))
        waiting = (*(state.inner or ()), *self.outputs(site, h))
        if site.name == "v":
            q, k, v = self.project(waiting, context.positions)
            entries = jnp.stack([k, v]).swapaxes(2, 3)
            return State(state.x, attention(q, LayerKV(entries=entries), context.positions, context.reach))
        if site.name == "up":
            gate, up = waiting
            return State(state.x, self.activate(gate) * up)
        return State(state.x, waiting)


_FAMILY = "llama, by linear"
FAMILIES[_FAMILY] = dataclasses.replace(FAMILIES["llama"], block=ByLinear)


def by_linear(model: Decoder) -> Decoder:
    """Return the same model with an input for every linear; its arrays are shared."""
    config = dataclasses.replace(model.config, model_type=_FAMILY)

    def abstract() -> ByLinear:
        return ByLinear(config, leading=(config.num_layers,), rngs=nnx.Rngs(0), dtype=jnp.float32)

    names = [name for site in ByLinear.sites for name in site.linears]
    arrays = {f"{name}.kernel": getattr(model.blocks, name).kernel.get_value() for name in names}
    arrays |= {f"{name}.scale": getattr(model.blocks, name).scale.get_value() for name in ByLinear.norms}
    return replace(model, config=config, blocks=replace(nnx.eval_shape(abstract), arrays))


def main(arguments: list[str] | None = None) -> None:
    """Quantise by both, and print a line for each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--recipe", default="paper-groups")
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--inputs", nargs="+", choices=("shared", "own"), default=["shared", "own"])
    options = parser.parse_args(arguments)
    xla_flags.disable_triton_gemm()
    try:
        name = (
            os.environ.get("TWLA_SMOLLM2") or options.model if options.model == "smollm2" else options.model
        )
        model, tokenizer = loading.load(name, dtype=jnp.float16)
        model, size = computing_in(model, jnp.float32), model.config.vocab_size
        test = corpora.tokenize(corpora.load_corpus(options.text, "evaluation"), tokenizer, size)
        text = corpora.load_corpus(options.text, "calibration")
        base = recipe.load_recipe(options.recipe)
        for seed in options.seeds:
            drawn = {"windows": options.windows, "seq_len": options.seq_len, "seed": seed}
            calibration = dataclasses.replace(base.calibration, **drawn)
            rotation = base.quantization.rotation and dataclasses.replace(
                base.quantization.rotation, seed=seed
            )
            settings = dataclasses.replace(base.quantization, rotation=rotation)
            windows = calibration_windows(text, tokenizer, size, calibration)
            for inputs in options.inputs:
                start = time.perf_counter()
                whole = model if inputs == "shared" else by_linear(model)
                quantized, _ = pipeline.quantize_blocks(whole, windows, settings, progress=False)
                seconds = time.perf_counter() - start
                scores = (
                    evaluate(
                        set_activation_bits(quantized, bits),
                        test,
                        seq_len=options.seq_len,
                        max_windows=options.max_windows,
                        batch_size=4,
                        progress=False,
                    )
                    for bits in options.bits
                )
                figures = "  ".join(
                    f"A{bits} {score['perplexity']:.1f}"
                    for bits, score in zip(options.bits, scores, strict=True)
                )
                print(
                    f"{options.recipe}, seed {seed}, {inputs} inputs: {figures}  ({seconds:.0f} s)",
                    flush=True,
                )
    except TwlaError as error:
        sys.exit(f"paper_rotations: error: {error}")


if __name__ == "__main__":
    main()
