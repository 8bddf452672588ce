"""End-to-end refinement: a ternary model learns the full-precision model's predictions, in the same packed format.

No labels are used: the loss is the KL divergence `Σ_v p_v (log p_v − log q_v)` from the full-precision model's
predictions p to the ternary model's q on calibration text. What learns is what inference stores anyway: codes, α, μ
and norms. A code is the rounding of a latent `u` in units of α, through which gradients pass straight (Bengio et al.,
arXiv 1308.3432):

    T = clip(round(u), −1, 1),    Ŵ = α₀(1 + s)·T + μ₀ + α₀·r,    ∂T/∂u := 1 where |u| < 1.5

All of u, s and r are free of units, so one learning rate serves every layer.
"""

import dataclasses
import functools
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

from twla_jax import kotms, packing, resume, ternary
from twla_jax.activation import OFF, ActivationQuantizer, with_bits
from twla_jax.models.attention import can_fuse
from twla_jax.models.decoder import SITES, Block, Decoder
from twla_jax.recipe import RefineRecipe

_LINEARS = {name: site for site, names in SITES.items() for name in names}
_NORMS = ("input_norm", "post_norm")
_MARGIN = 0.45  # from its code, at most, that a latent starts: on the code's side of the rounding boundary
_REACH = 1.5  # latents beyond pass no gradient: their code is the outermost already
_LOSS_CHUNK = 256  # positions whose logits exist at the same time, per window
_SNAPSHOT_SECONDS = 300

Latents = dict[str, dict[str, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _StraightThrough:
    """An activation quantiser that gradients pass as if it were not there."""

    quantizer: ActivationQuantizer

    def __call__(self, x: Float[Array, "*tokens m"]) -> Float[Array, "*tokens m"]:
        return x + jax.lax.stop_gradient(self.quantizer(x) - x)


def refine(
    student: Decoder,
    teacher: Decoder,
    windows: Int32[np.ndarray, "w s"],
    recipe: RefineRecipe,
    *,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> tuple[Decoder, dict[str, Any]]:
    """Trains the ternary weights and norms of `student` towards the predictions of `teacher`.

    Args:
      student: quantised, with or without rotations; its activation settings stay.
      teacher: the model it was quantised from.
      windows: calibration tokens; each is seen once, `recipe.batch` at a time, in order.
      work_dir: the state is kept here every few minutes; a later call with the same arguments goes on from it.
      progress: a bar with an estimate of the time left, on stderr.
    Returns:
      The refined model in the same format and the same bytes, and JSON-ready figures: `steps`, `tokens`, `loss` (KL
      in nats a token: means of the first and the last tenth of the steps), `flipped` (share of codes that changed).
    """
    steps = len(windows) // recipe.batch
    batches = windows[: steps * recipe.batch].reshape(steps, recipe.batch, -1)
    dtype = jnp.dtype(recipe.dtype)
    original = student
    student, teacher = (computing_in(model, dtype) for model in (student, teacher))
    latents = init_latents(student, teacher)
    optimizer = optimizer_for(recipe, steps)
    step = functools.partial(_step, optimizer=optimizer, bits=recipe.activation_bits)
    state = optimizer.init(latents)
    store = None if work_dir is None else open_work_dir(Path(work_dir), student, windows, recipe)
    losses: list[float] = []
    if store and (saved := store.load("state")):
        losses = saved.pop("losses").tolist()
        latents, state = resume.unflatten((latents, state), saved)
    saved_at = time.perf_counter()
    with tqdm(total=steps, initial=len(losses), desc="refine", unit="step", disable=not progress) as bar:
        for batch in batches[len(losses) :]:
            latents, state, loss = step(latents, state, student, teacher, batch)
            losses.append(float(loss))
            bar.update()
            bar.set_postfix(kl=f"{np.mean(losses[-20:]):.3f}")
            if store and time.perf_counter() - saved_at > _SNAPSHOT_SECONDS:
                store.save("state", {**resume.flatten((latents, state)), "losses": np.asarray(losses)})
                saved_at = time.perf_counter()
    refined = harden(student, latents)
    refined.dtype, refined.blocks.fused = original.dtype, original.blocks.fused
    tenth = max(1, steps // 10)
    figures = {
        "steps": steps,
        "tokens": int(batches.size),
        "loss": [float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))],
        "flipped": flipped(original, refined),
    }
    return refined, figures


def init_latents(student: Decoder, teacher: Decoder) -> Latents:
    """For each linear `u`, `s` and `r` (float32), for each norm `g`: the student as it is.

    u starts where the full-precision weight lies in units of α, but within its code's cell: the codes that the column
    sweep chose are kept, and those whose weight lies near a boundary are the first to change.
    """
    latents: Latents = {}
    for name, site in _LINEARS.items():
        tensor = getattr(student.blocks, name).kernel.get_value()
        transform = getattr(student.blocks, f"{site}_input").rotation
        rotation = None if transform is None else transform.get_value()
        kernel = getattr(teacher.blocks, name).kernel.get_value()
        latents[name] = {
            "u": jax.lax.map(_start, (kernel, tensor, rotation)),
            "s": jnp.zeros(tensor.alpha.shape),
            "r": jnp.zeros(tensor.alpha.shape),
        }
    for name in _NORMS:
        latents[name] = {"g": jnp.zeros(getattr(student.blocks, name).scale.get_value().shape)}
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

    @jax.checkpoint
    def chunk_kl(operands):
        p, q, real = operands
        p, q = (jax.nn.log_softmax(model.logits(h)) for model, h in ((teacher, p), (student, q)))
        return jnp.where(real, (jnp.exp(p) * (p - q)).sum(-1), 0).sum()

    return jax.lax.map(chunk_kl, (chunks(expected), chunks(got), real)).sum() / tokens.size


@functools.partial(jax.jit, static_argnames=("optimizer", "bits"), donate_argnames=("latents", "state"))
def _step(latents, state, student, teacher, tokens, *, optimizer, bits):
    loss, gradient = jax.value_and_grad(lambda p: kl_divergence(student, teacher, p, tokens, bits))(latents)
    updates, state = optimizer.update(gradient, state, latents)
    return optax.apply_updates(latents, updates), state, loss


@functools.lru_cache(maxsize=1)  # one object a recipe, so that `_step` compiles once
def optimizer_for(recipe: RefineRecipe, steps: int) -> optax.GradientTransformation:
    """Adam with a learning rate for codes and one for all that is continuous, both falling as a cosine to zero."""

    def adam(rate):
        return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.95)

    def labels(latents):
        return {
            name: {part: "codes" if part == "u" else "scales" for part in parts}
            for name, parts in latents.items()
        }

    return optax.partition({"codes": adam(recipe.code_rate), "scales": adam(recipe.scale_rate)}, labels)


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
    return student.norm(x) * (1 + latents["norm"]["g"]).astype(x.dtype)


def apply(block: Block, latents: Latents, bits: int) -> Block:
    """The block with the dense weights and the norms that `latents` stand for; changes it, which only a trace sees."""
    for name in _LINEARS:
        linear = getattr(block, name)
        tensor, parts = linear.kernel.get_value(), latents[name]
        alpha, mu = (
            ternary.per_column(p, tensor.in_features, tensor.group_size) for p in scales(tensor, parts)
        )
        linear.kernel = nnx.Param((_straight_through(parts["u"]) * alpha + mu).T)
    for site in SITES:
        transform = getattr(block, f"{site}_input")
        quantizer = with_bits(transform.activation.get_value(), bits)
        transform.activation = nnx.data(nnx.Param(_StraightThrough(quantizer)))
    for name in _NORMS:
        norm = getattr(block, name)
        norm.scale = nnx.Param(norm.scale.get_value().astype(jnp.float32) * (1 + latents[name]["g"]))
    return block


def scales(
    tensor: ternary.TernaryTensor, parts: dict[str, jax.Array]
) -> tuple[Float[Array, "*batch n groups"], Float[Array, "*batch n groups"]]:
    """`(α, μ)` under the offsets s and r, float32."""
    alpha, mu = tensor.alpha.astype(jnp.float32), tensor.mu.astype(jnp.float32)
    return alpha * (1 + parts["s"]), mu + alpha * parts["r"]


def _straight_through(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    passed = jnp.where(jnp.abs(u) < _REACH, u, jax.lax.stop_gradient(u))
    return passed + jax.lax.stop_gradient(_round(u) - passed)


def _round(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.clip(jnp.round(u), -1, 1)


def _start(layer) -> Float[Array, "n m"]:
    kernel, tensor, rotation = layer
    rows = kernel.T.astype(jnp.float32)
    if rotation is not None:
        rows = kotms.rotate(rows, rotation.left, rotation.right)
    codes = packing.unpack(tensor.codes, tensor.in_features).astype(jnp.float32) - 1
    alpha, mu = (
        ternary.per_column(p.astype(jnp.float32), tensor.in_features, tensor.group_size)
        for p in (tensor.alpha, tensor.mu)
    )
    u = (rows - mu) / jnp.where(alpha == 0, jnp.inf, alpha)
    return codes + jnp.clip(u - codes, -_MARGIN, _MARGIN)


def harden(student: Decoder, latents: Latents) -> Decoder:
    """The student, on the host, with what the latents stand for in its own format."""
    for name in _LINEARS:
        linear, parts = getattr(student.blocks, name), latents[name]
        tensor = linear.kernel.get_value()
        alpha, mu = scales(tensor, parts)
        hard = ternary.from_codes(_round(parts["u"]).astype(jnp.int8), alpha, mu, tensor.group_size)
        linear.kernel = nnx.Param(hard)
    for module, name in ((student.blocks, "input_norm"), (student.blocks, "post_norm"), (student, "norm")):
        norm = getattr(module, name)
        scale = norm.scale.get_value()
        norm.scale = nnx.Param((scale.astype(jnp.float32) * (1 + latents[name]["g"])).astype(scale.dtype))
    return jax.tree.map(np.asarray, student)


def flipped(before: Decoder, after: Decoder) -> float:
    """Share of codes that differ."""
    changed = total = 0
    for name in _LINEARS:
        tensors = (getattr(model.blocks, name).kernel.get_value() for model in (before, after))
        old, new = (np.asarray(packing.unpack(jnp.asarray(t.codes), t.in_features)) for t in tensors)
        changed, total = changed + int((old != new).sum()), total + old.size
    return changed / total


def computing_in(model: Decoder, dtype: jnp.dtype) -> Decoder:
    """A copy on the device that computes in `dtype`, with fused attention where there is one."""
    copy = nnx.merge(*nnx.split(model))
    copy.dtype = dtype
    # Most of a step's time went into reading and writing the scores.
    copy.blocks.fused = can_fuse(model.config, dtype)
    return jax.tree.map(jnp.asarray, copy)


def open_work_dir(
    folder: Path, student: Decoder, windows: np.ndarray, recipe: RefineRecipe
) -> resume.WorkDir:
    """The folder that belongs to this student, text and recipe.

    Raises:
      TwlaError: it holds other work.
    """
    arrays = map(np.asarray, [windows, *jax.tree.leaves(student)])
    return resume.WorkDir(folder, resume.fingerprint(dataclasses.asdict(recipe), arrays))
