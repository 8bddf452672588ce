"""End-to-end refinement: a ternary model learns the full-precision model's predictions, in the same packed format.

No labels are used: the loss is the KL divergence `Σ_v p_v (log p_v − log q_v)` from the full-precision model's
predictions p to the ternary model's q on calibration text. What learns is what inference stores anyway: codes, α, μ,
norms and, on the manifold, rotations. A code is the rounding of a latent `u` in units of α, through which gradients
pass straight (Bengio et al., arXiv 1308.3432):

    T = clip(round(u), −1, 1),    Ŵ = α₀(1 + s)·T + μ₀ + α₀·r,    ∂T/∂u := 1 where |u| < 1.5

All of u, s and r are free of units, so one learning rate serves every layer. Two planes: `two_plane_latents`. A
rotation turns the input alone: the codes are those of the turned basis, whatever it is.
"""

import dataclasses
import functools
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32
from tqdm import tqdm

from twla_jax.core import e2m_atq, kotms, packing, stiefel, two_planes
from twla_jax.core.activation import (
    BIT_CHOICES,
    OFF,
    ActivationQuantizer,
    fake_quantize,
    select_clip,
    with_bits,
)
from twla_jax.core.uniform import per_column
from twla_jax.errors import TwlaError
from twla_jax.models.decoder import SITES, Block, Decoder
from twla_jax.ops.attention.reference import can_fuse
from twla_jax.recipe import RefineRecipe
from twla_jax.refinement import two_plane_latents
from twla_jax.storage import resume

_LINEARS = {name: site for site, names in SITES.items() for name in names}
_NORMS = ("input_norm", "post_norm")
_MARGIN = 0.45  # from its code, at most, that a latent starts: on the code's side of the rounding boundary
_REACH = 1.5  # latents beyond pass no gradient: their code is the outermost already
_LEAST_CLIP = 0.1  # that one may learn
_LOSS_CHUNK = 256  # positions whose logits exist at the same time, per window
_SNAPSHOT_SECONDS = 300
_WARMUP = 0.1  # share of the steps over which learning rates rise; a good start is lost without

Latents = dict[str, dict[str, jax.Array]]
_log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _StraightThrough:
    """An activation quantiser that gradients pass as if it were not there, save for those of its clip.

    `clip_offset` is how much wider the range is than the quantiser's own, relative to that.
    """

    quantizer: ActivationQuantizer
    clip_offset: Float[Array, "*batch"] | None

    def __call__(self, x: Float[Array, "*tokens m"]) -> Float[Array, "*tokens m"]:
        fixed = jax.lax.stop_gradient(x)
        if self.clip_offset is None:
            return x + jax.lax.stop_gradient(self.quantizer(x) - x)
        bits, clip = self.quantizer.bits, trained_clip(self.quantizer, self.clip_offset)
        return x + (fake_quantize(fixed, bits, clip, rounding=_round_straight) - fixed)


def refine(
    student: Decoder,
    teacher: Decoder,
    windows: Int32[np.ndarray, "w s"],
    recipe: RefineRecipe,
    *,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> tuple[Decoder, dict[str, Any]]:
    """Trains what `student` stores of its blocks' linears, and its norms, towards the predictions of `teacher`.

    Args:
      student: quantised, with or without rotations; its activation settings stay.
      teacher: the model it was quantised from.
      windows: calibration tokens; each is seen once, `recipe.batch` at a time, in order.
      work_dir: the state is kept here every few minutes; a later call with the same arguments goes on from it.
      progress: a bar with an estimate of the time left, on stderr.
    Returns:
      The refined model in the same format and the same bytes, and JSON-ready figures: `steps`, `tokens`, `loss` (KL
      in nats a token: means of the first and the last tenth of the steps), `first_batch` (that of the first step's
      windows, before and after), `flipped` (share of codes that changed), and `kept`: False where the model ended
      further from its teacher on those windows than it began, and is returned as it was.
    Raises:
      TwlaError: fewer windows than one batch.
    """
    steps = len(windows) // recipe.batch
    if not steps:
        raise TwlaError(f"refinement needs at least one batch of {recipe.batch} windows, not {len(windows)}")
    batches = windows[: steps * recipe.batch].reshape(steps, recipe.batch, -1)
    dtype = jnp.dtype(recipe.dtype)
    original = student
    student, teacher = (computing_in(model, dtype) for model in (student, teacher))
    store = None if work_dir is None else open_work_dir(Path(work_dir), student, windows, recipe)
    latents, bits = init_latents(student, teacher), recipe.activation_bits
    return descend(
        original, student, teacher, latents, batches, recipe, bits=bits, store=store, progress=progress
    )


def descend(
    original: Decoder,
    student: Decoder,
    teacher: Decoder,
    latents: Latents,
    batches: Int32[np.ndarray, "steps b s"],
    recipe: RefineRecipe,
    *,
    bits: int,
    store: resume.WorkDir | None,
    progress: bool,
    label: str = "refine",
) -> tuple[Decoder, dict[str, Any]]:
    """What `refine` returns, from any latents of the student, which are donated: what has none is left as it is."""
    steps, learns_rotations = len(batches), recipe.rotation_rate > 0
    step = functools.partial(_step, bits=bits, learns_rotations=learns_rotations)
    state = optimizer(rates_at(recipe, 0, 1), learns_rotations).init(latents)
    losses: list[float] = []
    if store and (saved := store.load("state")):
        losses = saved.pop("losses").tolist()
        latents, state = resume.unflatten((latents, state), saved)
    saved_at = time.perf_counter()
    with tqdm(total=steps, initial=len(losses), desc=label, unit="step", disable=not progress) as bar:
        for batch in batches[len(losses) :]:
            rates = rates_at(recipe, len(losses), steps)
            latents, state, loss = step(latents, state, student, teacher, batch, rates)
            losses.append(float(loss))
            bar.update()
            bar.set_postfix(kl=f"{np.mean(losses[-20:]):.3f}")
            if store and time.perf_counter() - saved_at > _SNAPSHOT_SECONDS:
                store.save("state", {**resume.flatten((latents, state)), "losses": np.asarray(losses)})
                saved_at = time.perf_counter()
    refined = harden(student, latents, bits)
    refined.dtype, refined.blocks.fused = original.dtype, original.blocks.fused
    _, _, loss = step(latents, state, student, teacher, batches[0], rates_at(recipe, 0, 1))
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


def init_latents(student: Decoder, teacher: Decoder) -> Latents:
    """The student as it is: each linear's `u`, `s` and `r` (and `residual_s`), each norm's `g`, the rotations' factors.

    All are float32. u starts where the full-precision weight lies in units of α, but within its code's cell: the codes
    that the column sweep chose are kept, and those whose weight lies near a boundary are the first to change.
    """
    latents: Latents = {}
    for name, site in _LINEARS.items():
        tensor = getattr(student.blocks, name).kernel.get_value()
        transform = getattr(student.blocks, f"{site}_input").rotation
        rotation = None if transform is None else transform.get_value()
        kernel = getattr(teacher.blocks, name).kernel.get_value()
        latents[name] = {
            "u": _starts(kernel, tensor, rotation),
            "s": jnp.zeros(tensor.alpha.shape),
            "r": jnp.zeros(tensor.alpha.shape),
        }
        if tensor.residual_alpha is not None:
            latents[name]["residual_s"] = jnp.zeros(tensor.alpha.shape)
    for name in _NORMS:
        latents[name] = {"g": jnp.zeros(getattr(student.blocks, name).scale.get_value().shape)}
    for site in SITES:
        if (rotation := getattr(student.blocks, f"{site}_input").rotation) is not None:
            left, right = rotation.get_value().left, rotation.get_value().right
            latents[f"{site}_input"] = {"left": left.astype(jnp.float32), "right": right.astype(jnp.float32)}
    latents["norm"] = {"g": jnp.zeros(student.norm.scale.get_value().shape)}
    return latents


def kl_divergence(
    student: Decoder, teacher: Decoder, latents: Latents, tokens: Int32[Array, "b t"], bits: int = OFF
) -> Float[Array, ""]:
    """Mean KL divergence of the student under `latents`, its inputs at `bits`, from the teacher, in nats a token."""
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


def rates_at(recipe: RefineRecipe, step: int, steps: int) -> dict[str, float]:
    """Learning rates of one step: up in a line, then down to zero as a cosine; data, so that one program takes all."""
    warmup = math.ceil(_WARMUP * steps)
    falling = math.cos(math.pi * max(step - warmup, 0) / max(steps - warmup, 1))
    share = min((step + 1) / warmup, (1 + falling) / 2)
    peaks = {
        "codes": recipe.code_rate,
        "scales": recipe.scale_rate,
        "rotations": recipe.rotation_rate,
        "clips": recipe.clip_rate,
    }
    return {name: share * peak for name, peak in peaks.items()}


def optimizer(rates: dict[str, Any], learns_rotations: bool) -> optax.GradientTransformation:
    """Adam with a learning rate for codes, for scales and norms, for clips, and for rotations, on the manifold."""

    def labels(latents):
        return {name: {part: kinds.get(part, "scales") for part in parts} for name, parts in latents.items()}

    kinds = {"u": "codes", "left": "rotations", "right": "rotations", "clip": "clips"}
    adam = {name: optax.adam(rate, b2=0.95) for name, rate in rates.items()}
    rotations = stiefel.riemannian(adam["rotations"]) if learns_rotations else optax.set_to_zero()
    return optax.partition({**adam, "rotations": rotations}, labels)


def _hidden(
    student: Decoder, latents: Latents, tokens: Int32[Array, "b t"], bits: int
) -> Float[Array, "b t d"]:
    """`student.hidden` under `latents`; of each block only the input is kept for the gradient."""
    positions = student.positions(tokens.shape[1])

    @jax.checkpoint
    def step(x, layer):
        block, here, window = layer
        return apply(block, here, bits)(x, positions, window), None

    blocks = {name: parts for name, parts in latents.items() if name != "norm"}
    x, _ = jax.lax.scan(step, student.embed_tokens(tokens), (student.blocks, blocks, student.windows()))
    x = student.norm(x)
    return x * (1 + latents["norm"]["g"]).astype(x.dtype) if "norm" in latents else x


def apply(block: Block, latents: Latents, bits: int) -> Block:
    """The block with the weights, norms and inputs that `latents` stand for; changes it, which only a trace sees."""
    for name in filter(latents.__contains__, _LINEARS):
        linear = getattr(block, name)
        linear.kernel = nnx.Param(_dense(linear.kernel.get_value(), latents[name]).T)
    for site in SITES:
        transform, parts = getattr(block, f"{site}_input"), latents.get(f"{site}_input", {})
        if "left" in parts:
            rotation = kotms.KroneckerRotation(parts["left"], parts["right"])
            transform.rotation = nnx.data(nnx.Param(rotation))
        quantizer = with_bits(transform.activation.get_value(), bits)
        transform.activation = nnx.data(nnx.Param(_StraightThrough(quantizer, parts.get("clip"))))
    for name in filter(latents.__contains__, _NORMS):
        norm = getattr(block, name)
        norm.scale = nnx.Param(norm.scale.get_value().astype(jnp.float32) * (1 + latents[name]["g"]))
    return block


def trained_clip(quantizer: ActivationQuantizer, offset: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The clip at the quantiser's bits, so much wider relative to itself; at most 1, the whole range."""
    clip = jnp.vectorize(select_clip, signature="(n),()->()")(quantizer.clips, quantizer.bits)
    return jnp.clip(clip * (1 + offset), _LEAST_CLIP, 1)


def scales(
    tensor: e2m_atq.TernaryTensor, parts: dict[str, jax.Array]
) -> tuple[Float[Array, "*batch n groups"], ...]:
    """`(α, μ)`, or of two planes `(α₁, α₂, μ)`, under the offsets s and r, float32."""
    alpha, mu = tensor.alpha.astype(jnp.float32), tensor.mu.astype(jnp.float32)
    if tensor.residual_alpha is None:
        return alpha * (1 + parts["s"]), mu + alpha * parts["r"]
    residual_alpha = tensor.residual_alpha * (1 + parts["residual_s"])
    return alpha * (1 + parts["s"]), residual_alpha, mu + two_plane_latents.unit(tensor) * parts["r"]


def _dense(tensor: e2m_atq.TernaryTensor, parts: dict[str, jax.Array]) -> Float[Array, "n m"]:
    """Ŵ, float32, through whose codes gradients pass straight."""
    if tensor.residual_alpha is not None:
        return two_plane_latents.dense(parts["u"], tensor, scales(tensor, parts))
    alpha, mu = (per_column(p, tensor.in_features, tensor.group_size) for p in scales(tensor, parts))
    return _straight_through(parts["u"]) * alpha + mu


def _straight_through(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    passed = jnp.where(jnp.abs(u) < _REACH, u, jax.lax.stop_gradient(u))
    return passed + jax.lax.stop_gradient(_round(u) - passed)


def _round_straight(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def _round(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.clip(jnp.round(u), -1, 1)


@jax.jit
def _starts(kernels, tensors, rotations) -> Float[Array, "layers n m"]:
    return jax.lax.map(_start, (kernels, tensors, rotations))


def _start(layer) -> Float[Array, "n m"]:
    kernel, tensor, rotation = layer
    rows = kernel.T.astype(jnp.float32)
    if rotation is not None:
        rows = kotms.rotate(rows, rotation.left, rotation.right)
    if tensor.residual_alpha is not None:
        return two_plane_latents.start(rows, tensor)
    codes = packing.unpack(tensor.codes, tensor.in_features).astype(jnp.float32) - 1
    alpha, mu = (
        per_column(p.astype(jnp.float32), tensor.in_features, tensor.group_size)
        for p in (tensor.alpha, tensor.mu)
    )
    u = (rows - mu) / jnp.where(alpha == 0, jnp.inf, alpha)
    return codes + jnp.clip(u - codes, -_MARGIN, _MARGIN)


def harden(student: Decoder, latents: Latents, bits: int) -> Decoder:
    """The student, on the host, with what the latents stand for in its own format; clips are those at `bits`."""
    student = nnx.merge(*nnx.split(student))  # the caller's own stays as it is
    for name in filter(latents.__contains__, _LINEARS):
        linear, parts = getattr(student.blocks, name), latents[name]
        tensor = linear.kernel.get_value()
        alpha, *residual_alpha, mu = scales(tensor, parts)
        if residual_alpha:
            first, second = two_planes.split(two_plane_latents.codes(parts["u"], tensor))
            residual = (second.astype(jnp.int8), *residual_alpha)
        else:
            first, residual = _round(parts["u"]), ()
            alpha, mu = e2m_atq.in_whole_steps(alpha, mu, tensor.group_size)
        hard = e2m_atq.from_codes(first.astype(jnp.int8), alpha, mu, tensor.group_size, *residual)
        linear.kernel = nnx.Param(hard)
    for site in SITES:
        transform, parts = getattr(student.blocks, f"{site}_input"), latents.get(f"{site}_input", {})
        if "left" in parts:
            stored = (parts[side].astype(jnp.float16) for side in ("left", "right"))
            transform.rotation = nnx.data(nnx.Param(kotms.KroneckerRotation(*stored)))
        if "clip" in parts:
            quantizer = transform.activation.get_value()
            clip = trained_clip(with_bits(quantizer, bits), parts["clip"])
            clips = quantizer.clips.at[..., BIT_CHOICES.index(bits)].set(clip.astype(quantizer.clips.dtype))
            transform.activation = nnx.data(nnx.Param(dataclasses.replace(quantizer, clips=clips)))
    modules = {"input_norm": student.blocks, "post_norm": student.blocks, "norm": student}
    for name in filter(latents.__contains__, modules):
        norm = getattr(modules[name], name)
        scale = norm.scale.get_value()
        norm.scale = nnx.Param((scale.astype(jnp.float32) * (1 + latents[name]["g"])).astype(scale.dtype))
    return jax.tree.map(np.asarray, student)


def flipped(before: Decoder, after: Decoder) -> float:
    """Share of codes that differ."""
    changed = total = 0
    for name in _LINEARS:
        tensors = (getattr(model.blocks, name).kernel.get_value() for model in (before, after))
        for old, new in zip(*(tensor.planes() for tensor in tensors), strict=True):
            old, new = (packing.unpack(jnp.asarray(plane.codes), plane.in_features) for plane in (old, new))
            changed, total = changed + int((old != new).sum()), total + old.size
    return changed / total


def computing_in(model: Decoder, dtype: jnp.dtype) -> Decoder:
    """A copy on the device that computes in `dtype`, with the attention that trains fastest there."""
    copy = nnx.merge(*nnx.split(model))
    copy.dtype = dtype
    # Most of a step's time went into reading and writing the scores.
    copy.blocks.fused = can_fuse(model.config, dtype)
    return jax.tree.map(jnp.asarray, copy)


def open_work_dir(
    folder: Path, student: Decoder, windows: np.ndarray, recipe: RefineRecipe
) -> resume.WorkDir:
    """The folder that an interrupted refinement of this student, on these windows, left its state in."""
    arrays = map(np.asarray, [windows, *jax.tree.leaves(student)])
    return resume.WorkDir(folder, resume.fingerprint(dataclasses.asdict(recipe), arrays))
