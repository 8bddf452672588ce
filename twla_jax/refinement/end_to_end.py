"""Refines a ternary model towards the full-precision model's predictions, in the same packed format.

No labels are used: the loss is the KL divergence `Σ_v p_v (log p_v − log q_v)` from the full-precision model's
predictions p to the ternary model's q on calibration text. What learns is what inference stores anyway: codes, α, μ,
norms and, on the manifold, rotations. A code is the rounding of a latent `u` in units of α, through which gradients
pass straight (Bengio et al., arXiv 1308.3432):

    T = clip(round(u), −1, 1),    Ŵ = α₀(1 + s)·T + μ₀ + α₀·r,    ∂T/∂u := 1 where |u| < 1.5

All of u, s and r are free of units, so one learning rate serves every layer. Two planes: `two_plane_latents`. A
rotation turns the input alone: the codes are those of the turned basis, whatever it is.
"""

import functools
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32
from tqdm import tqdm

from twla_jax.core.activation import (
    OFF,
)
from twla_jax.errors import TwlaError
from twla_jax.models import sharding
from twla_jax.models.arguments import checked_tokens, require_pair, require_settings
from twla_jax.models.blocks import ChainBlock
from twla_jax.models.decoder import Decoder, computing_in
from twla_jax.models.layers import replace
from twla_jax.recipe import EndToEndSettings, LearningSettings
from twla_jax.refinement.latent_shardings import place_latents, place_state
from twla_jax.refinement.latents import Latents, apply, flipped, harden, init_latents
from twla_jax.refinement.schedule import optimizer, rates_at
from twla_jax.storage import resume

_LOSS_CHUNK = 256  # positions whose logits exist at the same time, per window
_SNAPSHOT_SECONDS = 300

_log = logging.getLogger(__name__)


@resume.keeps_work_dir
def refine(
    student: Decoder,
    teacher: Decoder,
    windows: Int32[np.ndarray, "w s"],
    settings: EndToEndSettings,
    *,
    work_dir: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> tuple[Decoder, dict[str, Any]]:
    """Train what `student` stores of its blocks' linears, and its norms, towards the predictions of `teacher`.

    Args:
      student: quantised, with or without rotations; its activation settings stay.
      teacher: the model it was quantised from.
      windows: calibration tokens; each is seen once, `settings.batch` at a time, in order.
      settings: of the refinement end to end.
      work_dir: the state is kept here every few minutes; a later call with the same arguments goes on from it.
      mesh: with axes `data` and `model`: the windows of a step are split over `data`, and both models, what learns and
        its optimiser over `model` as `sharding.shardings` says; the gradient is that of the whole step.
      progress: a bar with an estimate of the time left, on stderr.

    Returns:
      The refined model in the same format and the same bytes, and JSON-ready figures: `steps`, `tokens`, `loss` (KL
      in nats a token: means of the first and the last tenth of the steps), `first_batch` (that of the first step's
      windows, before and after), `flipped` (share of codes that changed), and `kept`: False where the model ended
      further from its teacher on those windows than it began, and is returned as it was.

    Raises:
      TwlaError: two models that do not belong together, what `checked_tokens` refuses, fewer windows than one batch.
    """
    require_pair(student, teacher)
    require_settings(settings, EndToEndSettings, "settings")
    windows = checked_tokens(windows, teacher.config, "windows")
    steps = len(windows) // settings.batch
    if not steps:
        raise TwlaError(
            f"refinement needs at least one batch of {settings.batch} windows, not {len(windows)}"
        )
    batches = windows[: steps * settings.batch].reshape(steps, settings.batch, -1)
    dtype = jnp.dtype(settings.dtype)
    original = student
    student, teacher = (training_form(model, dtype, mesh) for model in (student, teacher))
    store = None if work_dir is None else open_work_dir(Path(work_dir), student, windows, settings)
    latents = init_latents(student, teacher, codes=settings.code_rate > 0)
    bits = settings.activation_bits
    return descend(
        original,
        student,
        teacher,
        latents,
        batches,
        settings,
        bits=bits,
        store=store,
        mesh=mesh,
        progress=progress,
    )


def descend(
    original: Decoder,
    student: Decoder,
    teacher: Decoder,
    latents: Latents,
    batches: Int32[np.ndarray, "steps b s"],
    settings: LearningSettings,
    *,
    bits: int,
    store: resume.WorkDir | None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool,
    label: str = "refine",
) -> tuple[Decoder, dict[str, Any]]:
    """Return what `refine` does, from any latents of the student, which are donated; what has none stays as it is."""
    steps, learns_rotations = len(batches), settings.peak_rates.get("rotations", 0) > 0
    step = functools.partial(_step, bits=bits, learns_rotations=learns_rotations)
    if mesh is not None and settings.batch % mesh.shape["data"]:
        raise TwlaError(
            f"--mesh: batches of {settings.batch} windows cannot be split over data={mesh.shape['data']}"
        )
    latents = place_latents(latents, student, mesh)
    state = place_state(optimizer(rates_at(settings, 0, 1), learns_rotations).init(latents), student, mesh)
    losses: list[float] = []
    if store and (saved := store.load("state")):
        losses = saved.pop("losses").tolist()
        latents, state = resume.unflatten((latents, state), saved)
        latents, state = place_latents(latents, student, mesh), place_state(state, student, mesh)
    saved_at = time.perf_counter()
    with tqdm(total=steps, initial=len(losses), desc=label, unit="step", disable=not progress) as bar:
        for batch in batches[len(losses) :]:
            rates = rates_at(settings, len(losses), steps)
            batch = sharding.place_batch(batch, mesh)
            latents, state, loss = step(latents, state, student, teacher, batch, rates)
            losses.append(float(loss))
            bar.update()
            bar.set_postfix(kl=f"{np.mean(losses[-20:]):.3f}")
            if store and time.perf_counter() - saved_at > _SNAPSHOT_SECONDS:
                store.save("state", {**resume.flatten((latents, state)), "losses": np.asarray(losses)})
                saved_at = time.perf_counter()
    refined = harden(student, latents, bits)
    refined = replace(refined, dtype=original.dtype, fused=original.fused)
    first = sharding.place_batch(batches[0], mesh)
    _, _, loss = step(latents, state, student, teacher, first, rates_at(settings, 0, 1))
    first_batch = [losses[0], float(loss)]
    kept = first_batch[1] <= first_batch[0]
    if not kept:
        _log.warning(
            "refinement ended at %.3f nats from the original where it began at %.3f: the model is left as it was;"
            " more steps, more text or lower rates may help",
            *reversed(first_batch),
        )
    tenth = max(1, steps // 10)
    figures = {
        "steps": steps,
        "tokens": int(batches.size),
        "loss": [float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))],
        "first_batch": first_batch,
        "flipped": flipped(original, refined),
        "kept": kept,
    }
    return (refined if kept else original), figures


def kl_divergence(
    student: Decoder, teacher: Decoder, latents: Latents, tokens: Int32[Array, "b t"], bits: int = OFF
) -> Float[Array, ""]:
    """Return the mean KL divergence of the student under `latents`, inputs at `bits`, from the teacher, in nats."""
    expected = jax.lax.stop_gradient(teacher.hidden(tokens))
    got = _hidden(student, latents, tokens, bits)
    chunk = min(_LOSS_CHUNK, tokens.shape[1])
    padding = -tokens.shape[1] % chunk

    def chunks(h):
        h = jnp.pad(h, ((0, 0), (0, padding), (0, 0)))
        return h.reshape(h.shape[0], -1, chunk, h.shape[-1]).swapaxes(0, 1)

    real = jnp.arange(tokens.shape[1] + padding).reshape(-1, chunk) < tokens.shape[1]

    @functools.partial(jax.value_and_grad, argnums=1)
    def chunk_kl(p, q, real):
        p, q = (jax.nn.log_softmax(model.logits(h)) for model, h in ((teacher, p), (student, q)))
        return jnp.where(real, (jnp.exp(p) * (p - q)).sum(-1), 0).sum() / tokens.size

    # A chunk's gradient is taken while its logits are there: neither model's are computed again for the way back.
    got = chunks(got)
    fixed = jax.lax.stop_gradient(got)
    loss, slope = jax.lax.map(lambda chunk: chunk_kl(*chunk), (chunks(expected), fixed, real))
    return loss.sum() + (slope * (got - fixed)).sum().astype(loss.dtype)


@functools.partial(
    jax.jit, static_argnames=("bits", "learns_rotations"), donate_argnames=("latents", "state")
)
def _step(latents, state, student, teacher, tokens, rates, *, bits, learns_rotations):
    loss, gradient = jax.value_and_grad(lambda p: kl_divergence(student, teacher, p, tokens, bits))(latents)
    updates, state = optimizer(rates, learns_rotations).update(gradient, state, latents)
    return optax.apply_updates(latents, updates), state, loss


def _hidden(
    student: Decoder, latents: Latents, tokens: Int32[Array, "b t"], bits: int
) -> Float[Array, "b t d"]:
    """Return `student.hidden` under `latents`; of each block only the input is kept for the gradient."""
    context = student.context(tokens.shape[1])

    @jax.checkpoint
    def step(x: jax.Array, layer: tuple[ChainBlock, Latents, jax.Array]) -> tuple[jax.Array, None]:
        block, here, index = layer
        return apply(block, here, bits)(x, context.layer(index)), None

    blocks = {name: parts for name, parts in latents.items() if name != "norm"}
    x, _ = jax.lax.scan(
        step, student.embed_tokens(tokens), (student.blocks, blocks, jnp.arange(len(context.reach)))
    )
    x = student.norm(x)
    return x * (1 + latents["norm"]["g"]).astype(x.dtype) if "norm" in latents else x


def training_form(model: Decoder, dtype: jnp.dtype, mesh: jax.sharding.Mesh | None = None) -> Decoder:
    """Return a copy on the device or mesh that computes in `dtype`, with the attention that trains fastest there."""
    # Most of a step's time went into reading and writing the scores.
    return sharding.place(computing_in(model, dtype, fused=True), mesh)


def open_work_dir(
    folder: Path, student: Decoder, windows: np.ndarray, settings: LearningSettings
) -> resume.WorkDir:
    """Open the folder that an interrupted refinement of this student, on these windows, left its state in."""
    arrays = map(np.asarray, [windows, *jax.tree.leaves(student)])
    return resume.WorkDir(folder, resume.fingerprint(settings.to_dict(), arrays))
