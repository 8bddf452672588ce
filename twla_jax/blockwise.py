"""Block-wise refinement: each block, or sliding window of blocks, learns the full-precision model's residual stream.

A window of blocks takes what the already refined blocks before it give (`x`) and learns to give what the full-precision
model has after the same blocks (`y₀`), by Adam on the mean over tokens of `‖y − y₀‖² / ‖y₀‖²`. The latents are those of
`refinement`. All windows share one shape and one compilation.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32
from tqdm import tqdm

from twla_jax import refinement, resume
from twla_jax.models.decoder import Decoder
from twla_jax.recipe import RefineRecipe


def refine_blocks(
    student: Decoder,
    teacher: Decoder,
    windows: Int32[np.ndarray, "w s"],
    recipe: RefineRecipe,
    *,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> tuple[Decoder, dict[str, Any]]:
    """Trains the ternary weights and norms of each block of `student` towards the outputs of `teacher`'s blocks.

    Args:
      student: quantised, with or without rotations; its activation settings stay.
      teacher: the model it was quantised from.
      windows: calibration tokens; drawn anew for every block, `recipe.batch` at a time.
      work_dir: the state is kept here after every block; a later call with the same arguments goes on from it.
      progress: a bar with an estimate of the time left, on stderr.
    Returns:
      The refined model in the same format and the same bytes, and JSON-ready figures: `steps` of each window of blocks,
      `loss` (for each, means of the first and the last tenth of the steps), `flipped` (share of codes that changed).
    """
    original, dtype = student, jnp.dtype(recipe.dtype)
    student, teacher = (refinement.computing_in(model, dtype) for model in (student, teacher))
    latents = refinement.init_latents(student, teacher)
    layers, size = student.config.num_layers, min(recipe.block_window, student.config.num_layers)
    x = exact = student.embed_tokens(jnp.asarray(windows))
    losses: list[np.ndarray] = []
    store = None if work_dir is None else refinement.open_work_dir(Path(work_dir), student, windows, recipe)
    if store and (saved := store.load("state")):
        losses = list(saved.pop("losses"))
        latents, x, exact = resume.unflatten((latents, x, exact), saved)
    blocks = {name: parts for name, parts in latents.items() if name != "norm"}
    reach, positions = student.windows(), student.positions(windows.shape[1])
    count = layers - size + 1
    batch = min(recipe.batch, len(windows))
    with tqdm(
        total=count, initial=len(losses), desc="refine blocks", unit="block", disable=not progress
    ) as bar:
        for first in range(len(losses), count):
            rng = np.random.default_rng(first)
            draws = np.stack([rng.choice(len(windows), batch, False) for _ in range(recipe.block_steps)])
            mixed = rng.random(draws.shape) < recipe.block_mix
            here = functools.partial(jax.tree.map, lambda leaf, first=first: leaf[first : first + size])
            ours, theirs = here(student.blocks), here(teacher.blocks)
            fitted, loss = _fit(
                here(blocks),
                ours,
                theirs,
                x,
                exact,
                draws,
                mixed,
                reach[first : first + size],
                positions,
                recipe=recipe,
            )
            blocks = jax.tree.map(
                lambda leaf, new, at=first: leaf.at[at : at + size].set(new), blocks, fitted
            )
            head = functools.partial(jax.tree.map, lambda leaf: leaf[:1])
            x, exact = _move(
                head(fitted),
                head(ours),
                head(theirs),
                x,
                exact,
                reach[first : first + 1],
                positions,
                bits=recipe.activation_bits,
            )
            losses.append(np.asarray(loss))
            bar.update()
            bar.set_postfix(loss=f"{losses[-1][-1]:.4f}")
            if store:
                state = resume.flatten(({**blocks, "norm": latents["norm"]}, x, exact))
                store.save("state", {**state, "losses": np.stack(losses)})
    refined = refinement.harden(student, {**blocks, "norm": latents["norm"]})
    refined.dtype, refined.blocks.fused = original.dtype, original.blocks.fused
    tenth = max(1, recipe.block_steps // 10)
    figures = {
        "steps": recipe.block_steps,
        "loss": [[float(loss[:tenth].mean()), float(loss[-tenth:].mean())] for loss in losses],
        "flipped": refinement.flipped(original, refined),
    }
    return refined, figures


@functools.partial(jax.jit, static_argnames="recipe")
def _fit(latents, blocks, originals, x, exact, draws, mixed, reach, positions, *, recipe):
    optimizer = refinement.optimizer_for(recipe, recipe.block_steps)

    def step(carry, drawn):
        latents, state = carry
        index, swap = drawn
        start = exact[index]
        target = jax.lax.stop_gradient(_through(None, originals, start, reach, positions, 16))
        begin = jnp.where(swap[:, None, None], start, x[index])

        def loss(latents):
            return relative_error(
                _through(latents, blocks, begin, reach, positions, recipe.activation_bits), target
            )

        value, gradient = jax.value_and_grad(loss)(latents)
        updates, state = optimizer.update(gradient, state, latents)
        return (optax.apply_updates(latents, updates), state), value

    (latents, _), losses = jax.lax.scan(step, (latents, optimizer.init(latents)), (draws, mixed))
    return latents, losses


@functools.partial(jax.jit, static_argnames="bits")
def _move(latents, blocks, originals, x, exact, reach, positions, *, bits):
    """Both streams past the first block, a window at a time."""

    def one(windows):
        x, exact = (window[None] for window in windows)
        return (
            _through(latents, blocks, x, reach, positions, bits)[0],
            _through(None, originals, exact, reach, positions, 16)[0],
        )

    return jax.lax.map(one, (x, exact))


def _through(latents, blocks, x, reach, positions, bits):
    def step(x, layer):
        block, here, window = layer
        return (block if here is None else refinement.apply(block, here, bits))(x, positions, window), None

    return jax.lax.scan(step, x, (blocks, latents, reach))[0]


def relative_error(got: Float[Array, "b t d"], target: Float[Array, "b t d"]) -> Float[Array, ""]:
    """Mean over tokens of `‖y − y₀‖² / ‖y₀‖²`, float32: a few tokens of huge norm do not outweigh the rest."""
    got, target = got.astype(jnp.float32), target.astype(jnp.float32)
    return (jnp.square(got - target).sum(-1) / jnp.maximum(jnp.square(target).sum(-1), 1e-12)).mean()
