"""Refines each block, or sliding window of blocks, towards the full-precision model's residual stream.

A window of blocks takes what the already refined blocks before it give (`x`) and learns to give what the full-precision
model has after the same blocks (`y₀`), by Adam on the mean over tokens of `‖y − y₀‖² / ‖y₀‖²` (BRECQ, arXiv 2102.05426,
with a relative error). The latents are those of `refinement`. All windows share one shape and one compilation.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from twla_jax import hosts
from twla_jax.core.activation import OFF
from twla_jax.models import sharding
from twla_jax.models.arguments import checked_tokens, require_pair, require_settings
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace
from twla_jax.progress import Bar
from twla_jax.refinement import descent
from twla_jax.refinement.latent_shardings import place_latents
from twla_jax.refinement.latents import apply, flipped, harden, init_latents
from twla_jax.refinement.schedule import optimizer, rates_at
from twla_jax.refinement_settings import BlockRefinementSettings
from twla_jax.storage import resume


@resume.keeps_work_dir
def refine_blocks(
    student: Decoder,
    teacher: Decoder,
    windows: Int32[np.ndarray, "w s"],
    settings: BlockRefinementSettings,
    *,
    work_dir: str | Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> tuple[Decoder, dict[str, Any]]:
    """Train what each block of `student` stores towards the outputs of `teacher`'s blocks.

    Args:
      student: quantised, with or without rotations; its activation settings stay.
      teacher: the model it was quantised from.
      windows: calibration tokens; drawn anew for every block, `settings.batch` at a time.
      settings: of the refinement block by block.
      work_dir: the state is kept here after every block; a later call with the same arguments goes on from it.
      mesh: with axes `data`, over which the windows of a step are split, and `model`; each device holds the streams of
        all windows.
      progress: a bar with an estimate of the time left, on stderr.

    Returns:
      The refined model in the same format and the same bytes, and JSON-ready figures: `steps` of each window of blocks,
      `loss` (for each, means of the first and the last tenth of the steps), `flipped` (share of codes that changed).
      Blocks whose loss has not fallen are left as they were.
    """
    require_pair(student, teacher)
    require_settings(settings, BlockRefinementSettings, "settings")
    windows = checked_tokens(windows, teacher.config, "windows")
    original, dtype, steps = student, jnp.dtype(settings.dtype), settings.steps
    count, batch = student.config.num_layers, min(settings.batch, len(windows))
    sharding.require_split(batch, mesh)
    student, teacher = (descent.training_form(model, dtype, mesh) for model in (student, teacher))
    latents = place_latents(init_latents(student, teacher), student, mesh)
    blocks = {name: parts for name, parts in latents.items() if name != "norm"}
    tokens = sharding.place_everywhere(windows, mesh)
    x, exact = (sharding.place_everywhere(model.embed_tokens(tokens), mesh) for model in (student, teacher))
    losses: list[np.ndarray] = []
    store = None if work_dir is None else descent.open_work_dir(Path(work_dir), student, windows, settings)
    if store and (saved := store.load_for_all("state")):
        losses = list(saved.pop("losses"))
        blocks, x, exact = resume.unflatten((blocks, x, exact), saved)
    context = sharding.place_everywhere(student.context(windows.shape[1]), mesh)
    size = min(settings.window, count)
    count -= size - 1
    rates = [rates_at(settings, step, steps) for step in range(steps)]
    rates = jax.tree.map(lambda *each: np.asarray(each, np.float32), *rates)
    static = {"bits": settings.activation_bits, "mesh": mesh}
    tenth = max(1, steps // 10)

    def ends(loss: np.ndarray) -> list[float]:
        return [float(loss[:tenth].mean()), float(loss[-tenth:].mean())]

    def part(first: int, count: int) -> Any:
        return _part((blocks, student.blocks, teacher.blocks), first, count=count)

    bar = Bar(total=count, initial=len(losses), desc="refine blocks", unit="block", disable=not progress)
    with bar:
        for first in range(len(losses), count):
            rng = np.random.default_rng(first)
            draws = np.stack([rng.choice(len(windows), batch, False) for _ in range(steps)])
            schedule = (draws, rng.random(draws.shape) < settings.mix, rates)
            fitted, loss = _fit(
                *part(first, size),
                x,
                exact,
                schedule,
                context.span(first, size),
                learns_rotations=settings.rotation_rate > 0,
                **static,
            )
            losses.append(hosts.fetch(loss))
            before, after = ends(losses[-1])
            if after < before:
                blocks = _with_part(blocks, fitted, first)
            x, exact = _move(*part(first, 1), x, exact, context.span(first, 1), **static)
            bar.update()
            bar.set_postfix(error=f"{after:.4f}")
            if store:
                store.save_once("state", {**resume.flatten((blocks, x, exact)), "losses": np.stack(losses)})
    refined = harden(student, {**blocks, "norm": latents["norm"]}, settings.activation_bits)
    refined = replace(refined, dtype=original.dtype, fused=original.fused)
    figures = {
        "steps": steps,
        "loss": [ends(loss) for loss in losses],
        "flipped": flipped(original, refined),
    }
    return refined, figures


@functools.partial(jax.jit, static_argnames="count")
def _part(stacks: Any, first: int, *, count: int) -> Any:
    """Return layers from `first` on of every array, by one program for all of them and for every `first`."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), stacks)


@functools.partial(jax.jit, donate_argnames="stacks")
def _with_part(stacks: Any, part: Any, first: int) -> Any:
    """Return the stacks with other layers from `first` on."""
    return jax.tree.map(
        lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, first, 0), stacks, part
    )


@functools.partial(jax.jit, static_argnames=("bits", "mesh", "learns_rotations"))
def _fit(latents, blocks, originals, x, exact, schedule, context, *, bits, mesh, learns_rotations):
    def step(carry, drawn):
        latents, state = carry
        index, swap, rates = drawn
        start = _split(exact[index], mesh)
        target = _through(None, originals, start, context, OFF)
        begin = jnp.where(swap[:, None, None], start, _split(x[index], mesh))

        def loss(latents):
            return relative_error(_through(latents, blocks, begin, context, bits), target)

        value, gradient = jax.value_and_grad(loss)(latents)
        updates, state = optimizer(rates, learns_rotations).update(gradient, state, latents)
        return (optax.apply_updates(latents, updates), state), value

    rates = jax.tree.map(lambda rate: rate[0], schedule[2])
    state = optimizer(rates, learns_rotations).init(latents)
    (latents, _), losses = jax.lax.scan(step, (latents, state), schedule)
    return latents, losses


@functools.partial(jax.jit, static_argnames=("bits", "mesh"), donate_argnames=("x", "exact"))
def _move(latents, blocks, originals, x, exact, context, *, bits, mesh):
    """Move both streams past the first block, a window at a time, or on a mesh one for each of `data`."""
    count, each = len(x), sharding.batch_on(mesh, 1)

    def some(windows):
        x, exact = (_split(window, mesh) for window in windows)
        return _through(latents, blocks, x, context, bits), _through(None, originals, exact, context, OFF)

    def grouped(stream):
        filled = jnp.pad(stream, ((0, -count % each), (0, 0), (0, 0)))
        return filled.reshape(-1, each, *stream.shape[1:])

    moved = jax.lax.map(some, (grouped(x), grouped(exact)))
    return tuple(_whole(stream.reshape(-1, *stream.shape[2:])[:count], mesh) for stream in moved)


def _split(windows, mesh):
    """Return windows split over `data`, so that what follows is computed so."""
    return (
        windows if mesh is None else jax.lax.with_sharding_constraint(windows, sharding.batch_sharding(mesh))
    )


def _whole(windows, mesh):
    """Return windows that every device has."""
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return windows if whole is None else jax.lax.with_sharding_constraint(windows, whole)


def _through(latents, blocks, x, context, bits):
    def step(x, layer):
        block, here, index = layer
        block = block if here is None else apply(block, here, bits, x.shape[0] * x.shape[1])
        return block(x, context.layer(index)), None

    return jax.lax.scan(step, x, (blocks, latents, jnp.arange(len(context.reach))))[0]


def relative_error(got: Float[Array, "b t d"], target: Float[Array, "b t d"]) -> Float[Array, ""]:
    """Return the mean over tokens of `‖y − y₀‖² / ‖y₀‖²`, float32: no few tokens of huge norm outweigh the rest."""
    got, target = got.astype(jnp.float32), target.astype(jnp.float32)
    return (jnp.square(got - target).sum(-1) / jnp.maximum(jnp.square(target).sum(-1), 1e-12)).mean()
