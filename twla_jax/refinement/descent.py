"""Takes the steps of a refinement, keeps its state, and returns the model where it came nearer."""

import logging
import time
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from twla_jax import hosts
from twla_jax.models import sharding
from twla_jax.models.decoder import Decoder, computing_in
from twla_jax.models.layers import replace
from twla_jax.progress import Bar
from twla_jax.refinement.latents import flipped
from twla_jax.refinement.schedule import rates_at
from twla_jax.refinement_settings import LearningSettings
from twla_jax.storage import resume

_SNAPSHOT_SECONDS = 300
_STATE = 2  # form of what an interrupted refinement leaves; work in another form is refused

_log = logging.getLogger(__name__)


class Training(Protocol):
    """Defines what `descend` drives: latents and their optimiser's state, in `values`, and a step that changes them."""

    values: Any

    def step(self, tokens: Int32[np.ndarray, "b t"], rates: dict[str, float], number: int) -> jax.Array:
        """Return the loss on a batch before the step that is taken on it."""
        ...

    def restore(self, saved: dict[str, np.ndarray]) -> None:
        """Take what an interrupted run kept of `values`."""
        ...

    def loss(self, tokens: Int32[np.ndarray, "b t"]) -> jax.Array:
        """Return the loss on a batch; what is in `values` may be spent."""
        ...

    def harden(self) -> Decoder:
        """Return the student, on the host, with what the latents stand for in its own format."""
        ...


def descend(
    original: Decoder,
    training: Training,
    batches: Int32[np.ndarray, "steps b s"],
    settings: LearningSettings,
    *,
    store: resume.WorkDir | None,
    progress: bool,
    label: str = "refine",
) -> tuple[Decoder, dict[str, Any]]:
    """Return what `refine` does: the model after a step on every batch, if that brought it nearer, and figures."""
    steps = len(batches)
    losses: list[Any] = []  # floats; the last one may still be on its way from the device
    if store and (saved := store.load_for_all("state")):
        losses = saved.pop("losses").tolist()
        training.restore(saved)
    saved_at, kept_steps = time.perf_counter(), len(losses)

    def keep() -> None:
        if store:
            values = resume.flatten(training.values)
            store.save_once("state", {**values, "losses": np.asarray(losses, np.float64)})

    with Bar(total=steps, initial=len(losses), desc=label, unit="step", disable=not progress) as bar:
        for batch in batches[len(losses) :]:
            rates = rates_at(settings, len(losses), steps)
            losses.append(training.step(batch, rates, len(losses)))
            # The loss before this one, so that the device does not wait between steps.
            losses[-2:-1] = map(float, losses[-2:-1])
            bar.update()
            bar.set_postfix(kl=f"{np.mean(losses[-21:-1] or [float(losses[-1])]):.3f}")
            late = time.perf_counter() - saved_at > _SNAPSHOT_SECONDS
            if store and hosts.from_first(lambda late=late: late):
                keep()
                saved_at, kept_steps = time.perf_counter(), len(losses)
    losses = list(map(float, losses))
    if len(losses) > kept_steps:  # what follows, up to the folder's writing, may take a while
        keep()
    refined = replace(training.harden(), dtype=original.dtype, fused=original.fused)
    first_batch = [losses[0], float(training.loss(batches[0]))]
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


def training_form(model: Decoder, dtype: jnp.dtype, mesh: jax.sharding.Mesh | None = None) -> Decoder:
    """Return a copy on the device or mesh that computes in `dtype`, with the attention that trains fastest there."""
    # Most of a step's time went into reading and writing the scores.
    return sharding.place(computing_in(model, dtype, fused=True), mesh)


def open_work_dir(
    folder: Path, student: Decoder, windows: np.ndarray, settings: LearningSettings
) -> resume.WorkDir:
    """Open the folder that an interrupted refinement of this student, on these windows, left its state in."""
    arrays = map(hosts.fetch, [windows, *jax.tree.leaves(student)])
    return resume.WorkDir(folder, resume.fingerprint({"state": _STATE, **settings.to_dict()}, arrays))
