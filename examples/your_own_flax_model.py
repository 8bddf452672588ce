"""Your own Flax model made ternary: three steps, and what each costs.

    pip install 'twla-jax[qwix]'
    python examples/your_own_flax_model.py

The model below knows nothing of twla_jax. Rules on module paths say which of its linears become ternary. One pass over
batches collects the second moments of their inputs; then every kernel is rotated and swept. The result is called,
jitted, saved and restored as before.
"""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx

from twla_jax.core.settings import CompensationSettings, RotationSettings, WeightSettings
from twla_jax.integrations import TwlaRule, quantize_nnx, quantized_nnx_shapes


class Mixer(nnx.Module):
    """A small residual network, to stand for yours."""

    def __init__(self, width: int, depth: int, rngs: nnx.Rngs):
        self.up = nnx.List([nnx.Linear(width, 4 * width, rngs=rngs) for _ in range(depth)])
        self.down = nnx.List([nnx.Linear(4 * width, width, rngs=rngs) for _ in range(depth)])
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, 8, rngs=rngs)

    def __call__(self, x):
        for up, down, norm in zip(self.up, self.down, self.norms, strict=True):
            x = x + down(nnx.gelu(up(norm(x))))
        return self.head(x)


def make_batch(key, size=256, width=64):
    """Inputs, and classes that depend on them."""
    x = jax.random.normal(key, (size, width)) * 0.9 ** jnp.arange(width)
    features = jax.random.normal(jax.random.key(1), (width, 8))
    return x, jnp.argmax(jnp.tanh(x) @ features + jnp.square(x) @ features[::-1], axis=-1)


@nnx.jit
def train_step(model, optimizer, x, labels):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def accuracy(model, x, labels):
    return (jnp.argmax(model(x), axis=-1) == labels).mean()


def size_in_bytes(model):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def main(steps=300):
    model = Mixer(64, 2, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for seed in range(steps):
        train_step(model, optimizer, *make_batch(jax.random.key(100 + seed)))
    test_x, test_labels = make_batch(jax.random.key(7), size=2048)

    # 1. Which linears, and how: every linear of `up` and `down`; `head` stays as it is.
    rules = [
        TwlaRule(
            module_path=r"(up|down)/\d+",
            weights=WeightSettings(group_size=64, compensation=CompensationSettings(propagation=0.0)),
            rotation=RotationSettings(steps=50),
        )
    ]
    # 2. Quantise on batches like those the model was trained on. `model` itself stays as it was.
    batches = [make_batch(jax.random.key(50 + seed))[0] for seed in range(8)]
    packed, report = quantize_nnx(model, batches, rules)
    for path, figures in report.items():
        print(f"{path:16} output error {figures['output_error']:.3f}")
    for name, each in (("float32", model), ("ternary", packed)):
        score = accuracy(each, test_x, test_labels)
        print(f"{name}: accuracy {score:.3f}, {size_in_bytes(each):,} bytes")

    # 3. Save and restore with plain orbax. The target's shapes come from the model and the rules alone.
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "packed", nnx.state(packed))
        checkpointer.wait_until_finished()
        graph, target = nnx.split(quantized_nnx_shapes(model, batches[0], rules))
        restored = nnx.merge(graph, checkpointer.restore(Path(folder) / "packed", target))
    same = jnp.array_equal(
        nnx.jit(lambda m, x: m(x))(restored, test_x), nnx.jit(lambda m, x: m(x))(packed, test_x)
    )
    print(f"restored model gives the same outputs: {bool(same)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
