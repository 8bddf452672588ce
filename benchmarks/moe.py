"""A mixture of experts of Qwen3-30B-A3B's shape, with fewer layers and a small vocabulary: quantised and decoded.

    python benchmarks/moe.py [--layers 2] [--small]

Checks the kernel of packed experts against XLA on this device, quantises a random model block by block, packs it, and
times decode steps beside bf16. A short table comes last; the exit status is 1 where the kernel differs.
"""

import argparse
import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from twla_jax.bench import decode, shapes, timing
from twla_jax.core.settings import ActivationSettings, QuantizationSettings, RotationSettings, WeightSettings
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.sites import set_activation_bits
from twla_jax.ops.expert_matmul import expert_matmul, expert_products
from twla_jax.ops.ternary_matmul import kernel_weight
from twla_jax.quantization.pipeline import quantize_blocks

A3B = DecoderConfig(
    model_type="qwen3_moe",
    vocab_size=4096,
    hidden_size=2048,
    intermediate_size=768,
    num_layers=2,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    max_position_embeddings=4096,
    qk_norm=True,
    num_experts=128,
    experts_per_token=8,
    normalize_routing=True,
)
SMALL = dataclasses.replace(
    A3B,
    hidden_size=256,
    intermediate_size=128,
    num_heads=2,
    num_kv_heads=1,
    num_experts=8,
    experts_per_token=2,
)
TOLERANCE = 1e-2  # of the largest output, of which bf16 holds 8 bits


class Table(list):
    """Rows of a table; each is printed as it is found, and all of them at the end."""

    def add(self, name: str, value: str) -> None:
        """Append a row."""
        self.append((name, value))
        print(f"{name}: {value}", file=sys.stderr, flush=True)


def stacked(config: DecoderConfig, n: int, m: int, key: jax.Array):
    """Return random matrices of all experts in the kernels' layout."""
    keys = jax.random.split(key, config.num_experts)
    return jax.vmap(lambda key: kernel_weight([shapes.ternary_tensor(key, n, m)]))(keys)


def floats(config: DecoderConfig, n: int, m: int, key: jax.Array) -> jax.Array:
    """Return random matrices of all experts in bf16."""
    return jax.random.normal(key, (config.num_experts, m, n), jnp.bfloat16)


def operands(config: DecoderConfig, m: int, held, key: jax.Array):
    """Return a token, the matrices of all experts and the token's own."""
    experts = jax.random.permutation(key, config.num_experts)[: config.experts_per_token]
    return jax.random.normal(key, (1, m), jnp.bfloat16), held(key), experts[None].astype(jnp.int32)


def choices(config: DecoderConfig, tokens: int) -> jax.Array:
    """Return different experts for each token."""
    rng = np.random.default_rng(0)
    each = [rng.permutation(config.num_experts)[: config.experts_per_token] for _ in range(tokens)]
    return jnp.asarray(np.stack(each), jnp.int32)


def check(config: DecoderConfig, rows: Table) -> bool:
    """Compare the device's kernel with XLA, and time it beside bf16 for one token; return whether they agree."""
    fine = True
    m, n = config.hidden_size, 2 * config.intermediate_size
    weight = jax.jit(functools.partial(stacked, config, n, m))(jax.random.key(0))
    for tokens in (1, 16, 512):
        experts = choices(config, tokens)
        for kind in ("int8", "bf16"):
            x = shapes.tokens(jax.random.key(1), tokens, m)
            x = x if kind == "int8" else jax.random.normal(jax.random.key(1), (tokens, m), jnp.bfloat16)
            found, expected = (
                jax.jit(functools.partial(expert_matmul, implementation=which))(x, weight, experts)
                for which in (None, "xla")
            )
            found, expected = (np.asarray(each, np.float32) for each in (found, expected))
            difference = np.abs(found - expected).max() / np.abs(expected).max()
            fine &= bool(difference < TOLERANCE)
            rows.add(f"kernel, {tokens} tokens, {kind}: largest difference", f"{difference:.1e}")
    for name, op, held, bits in (
        ("packed", expert_matmul, functools.partial(stacked, config, n, m), 2),
        ("bf16", expert_products, functools.partial(floats, config, n, m), 16),
    ):
        size = config.experts_per_token * n * m * bits // 8
        taken = timing.seconds_each(op, functools.partial(operands, config, m, held), size)
        what = f"gate and up of one token's {config.experts_per_token} experts"
        rows.add(f"{what}, {name}", f"{taken * 1e6:.1f} µs")
    return fine


def quantize(config: DecoderConfig, tokens: int, rows: Table) -> Decoder:
    """Quantise a random model, and say how long each stage took."""
    seq_len = min(512, tokens // 8)
    make = functools.partial(Decoder, config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = jax.jit(lambda: make(rngs=nnx.Rngs(0)))()
    windows = np.random.default_rng(0).integers(0, config.vocab_size, (tokens // seq_len, seq_len))
    settings = QuantizationSettings(
        weights=WeightSettings(),
        rotation=RotationSettings(steps=20, rows=4096),
        activations=ActivationSettings(bits=8, clips=(1.0, 0.9), clip_tokens=256),
    )
    start = time.perf_counter()
    quantized, report = quantize_blocks(model, windows.astype(np.int32), settings, progress=False)
    taken = time.perf_counter() - start
    pooled = [len(site["pooled_experts"]) for site in report["sites"] if "pooled_experts" in site]
    what = f"quantise {config.num_layers} layers, {windows.size} tokens, compilation included"
    rows.add(what, f"{taken:.1f} s")
    for stage, spent in report["seconds"].items():
        rows.add(f"  of it {stage}", f"{spent:.1f} s")
    rows.add("experts of a layer that saw too few tokens, at most", f"{max(pooled)} of {config.num_experts}")
    rows.add("largest output error", f"{max(site['output_error'] for site in report['sites']):.3f}")
    return quantized


def decode_times(config: DecoderConfig, quantized: Decoder, rows: Table) -> None:
    """Time decode steps of the quantised model, packed, and of a random one in bf16."""
    settings = decode.DecodeSettings(context=128, steps=32)
    forms = {
        "bf16": lambda: shapes.random_decoder(config, activation_bits=None),
        "W1.58A8": lambda: prepare_for_inference(quantized, unpack=False),
        "W1.58A16": lambda: prepare_for_inference(set_activation_bits(quantized, 16), unpack=False),
    }
    for name, make in forms.items():
        model = make()
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.blocks))
        rows.add(f"{name}: bytes of the blocks", f"{held:,}")
        for batch in (1, 8):
            taken = decode.step_seconds(model, batch, settings)
            rows.add(f"{name}: decode step of {batch}", f"{taken * 1e6:.0f} µs")
        del model


def main() -> None:
    """Run all parts and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try the script without a GPU")
    args = parser.parse_args()
    config = dataclasses.replace(SMALL if args.small else A3B, num_layers=args.layers)
    begin = time.perf_counter()
    rows = Table()
    fine = check(config, rows)
    quantized = quantize(config, args.tokens, rows)
    decode_times(config, quantized, rows)
    rows.add("all of this", f"{time.perf_counter() - begin:.0f} s")
    device = jax.devices()[0]
    print(f"\n{device.device_kind}, {config.num_layers} layers, {timer_name()}")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value:>16}")
    sys.exit(0 if fine else 1)


def timer_name() -> str:
    """Return how single ops are timed."""
    return f"single ops by {timing.timer()}"


if __name__ == "__main__":
    main()
