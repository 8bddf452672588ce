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
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from twla_jax import hosts
from twla_jax.core.activation import OFF
from twla_jax.errors import TwlaError
from twla_jax.inference import self_sampling
from twla_jax.models import sharding
from twla_jax.models.arguments import checked_tokens, require_pair, require_settings
from twla_jax.models.blocks import ChainBlock
from twla_jax.models.decoder import Decoder
from twla_jax.refinement.descent import Training, descend, open_work_dir, training_form
from twla_jax.refinement.divergence import kl_of_hidden
from twla_jax.refinement.latent_shardings import place_latents, place_state
from twla_jax.refinement.latents import Latents, apply, harden, init_latents
from twla_jax.refinement.schedule import optimizer
from twla_jax.refinement.streamed import StreamedTraining
from twla_jax.refinement_settings import EndToEndSettings, LearningSettings
from twla_jax.storage import resume

_TIMED_STEPS = 3  # from which the number of steps in a time is estimated
_SHARE = 0.95  # of the time, that steps are planned for
_OWN_SHARE = 0.2  # of the time, that the teacher's own text may take


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
    if settings.streaming and mesh is not None and mesh.size > 1:
        raise TwlaError("a streaming refinement runs on one device: leave out `streaming` or the mesh")
    started = time.perf_counter()
    if settings.own_text:
        windows = _with_own_text(teacher, windows, settings, work_dir, progress)
    dtype = jnp.dtype(settings.dtype)
    original = student
    student, teacher = (training_form(model, dtype, mesh) for model in (student, teacher))
    store = None if work_dir is None else open_work_dir(Path(work_dir), student, windows, settings)
    if settings.streaming:
        training = StreamedTraining(student, teacher, settings)
    else:
        latents = init_latents(student, teacher, codes=settings.code_rate > 0)
        training = WholeTraining(student, teacher, latents, settings, settings.activation_bits, mesh)
    if settings.minutes:
        steps = _planned(training, windows[: settings.batch], settings, store, started)
    rows = np.arange(steps * settings.batch) % len(windows)
    batches = windows[rows].reshape(steps, settings.batch, -1)
    return descend(original, training, batches, settings, store=store, progress=progress)


def _with_own_text(
    teacher: Decoder,
    windows: Int32[np.ndarray, "w s"],
    settings: EndToEndSettings,
    work_dir: str | Path | None,
    progress: bool,
) -> Int32[np.ndarray, "w s"]:
    """Return the windows, a share of which, drawn at random, the teacher has continued piece by piece."""
    drawn = np.random.default_rng(0).permutation(len(windows))[: round(settings.own_text * len(windows))]
    drawn.sort()
    seconds = _OWN_SHARE * 60 * settings.minutes or None
    folder = None if work_dir is None else Path(work_dir, "own_text")
    options = {"seconds": seconds, "work_dir": folder, "progress": progress}
    written = hosts.from_first(
        lambda: self_sampling.continue_windows(teacher, windows[drawn], **options) if len(drawn) else None
    )
    if written is None:
        return windows
    mixed = windows.copy()
    mixed[drawn] = written
    return mixed


def _planned(
    training: "Training",
    batch: Int32[np.ndarray, "b s"],
    settings: EndToEndSettings,
    store: resume.WorkDir | None,
    started: float,
) -> int:
    """Return how many steps there is time for; a plan that an interrupted run made is kept.

    The steps that are timed have no rate: they move nothing but the moments.
    """
    if store and (plan := store.load_for_all("plan")):
        return int(plan["steps"])
    rest = dict.fromkeys(settings.peak_rates, 0.0)
    float(training.step(batch, rest, 0))  # compiles
    begun = time.perf_counter()
    for number in range(_TIMED_STEPS):
        float(training.step(batch, rest, number))
    now = time.perf_counter()
    left = _SHARE * 60 * settings.minutes - (now - started)
    steps = hosts.from_first(lambda: max(1, int(left * _TIMED_STEPS / (now - begun))))
    if store:
        store.save_once("plan", {"steps": np.asarray(steps)})
    return steps


class WholeTraining:
    """Trains all latents of a student at once, from the gradient of the whole model."""

    def __init__(
        self,
        student: Decoder,
        teacher: Decoder,
        latents: Latents,
        settings: LearningSettings,
        bits: int,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Begin.

        Args:
          student: quantised, on the device.
          teacher: the model it was quantised from, on the device.
          latents: of the student, donated; what has none stays as it is.
          settings: the rates are read.
          bits: that the linear inputs are quantised to.
          mesh: what windows, latents and state are split over.

        Raises:
          TwlaError: a batch that cannot be split over the mesh.
        """
        sharding.require_split(settings.batch, mesh)
        learns_rotations = settings.peak_rates.get("rotations", 0) > 0
        self._models, self._bits, self._mesh = (student, teacher), bits, mesh
        form = {"learns_rotations": learns_rotations, "dtype": settings.dtype}
        self._step = functools.partial(_step, bits=bits, **form)
        self._rest = dict.fromkeys(settings.peak_rates, 0.0)
        latents = place_latents(latents, student, mesh)
        self.values = (
            latents,
            place_state(optimizer(self._rest, **form).init(latents), student, mesh),
        )

    def restore(self, saved: dict[str, np.ndarray]) -> None:
        """Take what an interrupted run kept of `values`, which are spent: there may be no room for both."""
        student = self._models[0]
        resume.discard(self.values)
        latents, state = resume.unflatten(tuple(self.values), saved)
        self.values = place_latents(latents, student, self._mesh), place_state(state, student, self._mesh)

    def step(self, tokens: Int32[np.ndarray, "b t"], rates: dict[str, float], number: int) -> jax.Array:
        """Return the loss on a batch before the step that is taken on it."""
        placed = sharding.place_batch(tokens, self._mesh)
        *self.values, loss = self._step(*self.values, *self._models, placed, rates)
        return loss

    def loss(self, tokens: Int32[np.ndarray, "b t"]) -> jax.Array:
        """Return the loss on a batch, by the program that also takes steps: `values` are spent."""
        return self.step(tokens, self._rest, 0)

    def harden(self) -> Decoder:
        """Return the student, on the host, with what the latents stand for in its own format."""
        return harden(self._models[0], self.values[0], self._bits)


def kl_divergence(
    student: Decoder, teacher: Decoder, latents: Latents, tokens: Int32[Array, "b t"], bits: int = OFF
) -> Float[Array, ""]:
    """Return the mean KL divergence of the student under `latents`, inputs at `bits`, from the teacher, in nats."""
    expected = jax.lax.stop_gradient(teacher.hidden(tokens))
    got = _hidden(student, latents, tokens, bits)
    return kl_of_hidden(student, teacher, got, expected, tokens.size)


@functools.partial(
    jax.jit, static_argnames=("bits", "learns_rotations", "dtype"), donate_argnames=("latents", "state")
)
def _step(latents, state, student, teacher, tokens, rates, *, bits, learns_rotations, dtype):
    loss, gradient = jax.value_and_grad(lambda p: kl_divergence(student, teacher, p, tokens, bits))(latents)
    updates, state = optimizer(rates, learns_rotations, dtype=dtype).update(gradient, state, latents)
    return optax.apply_updates(latents, updates), state, loss


def _hidden(
    student: Decoder, latents: Latents, tokens: Int32[Array, "b t"], bits: int
) -> Float[Array, "b t d"]:
    """Return `student.hidden` under `latents`; of each block only the input is kept for the gradient."""
    context = student.context(tokens.shape[1])

    @jax.checkpoint
    def step(x: jax.Array, layer: tuple[ChainBlock, Latents, jax.Array]) -> tuple[jax.Array, None]:
        block, here, index = layer
        return apply(block, here, bits, tokens.size)(x, context.layer(index)), None

    blocks = {name: parts for name, parts in latents.items() if name != "norm"}
    x, _ = jax.lax.scan(
        step, student.embed_tokens(tokens), (student.blocks, blocks, jnp.arange(len(context.reach)))
    )
    x = student.norm(x)
    return x * (1 + latents["norm"]["g"]).astype(x.dtype) if "norm" in latents else x
