"""Decides which form of a model answers: as the quantiser left it, or packed for the kernels."""

from typing import Literal

import jax

from twla_jax.core.quantizers import PackedTensor
from twla_jax.core.tensors import TernaryTensor
from twla_jax.devices import gpu_obstacle
from twla_jax.errors import TwlaError
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.inference.unpacked import runs_unpacked, unpacked_bytes
from twla_jax.models import sharding
from twla_jax.models.decoder import Decoder, computing_in

Kernels = Literal["auto", "on", "off"]
REFERENCE = "the quantiser's own arithmetic"


def has_kernels() -> bool:
    """Return whether there are kernels for the default device."""
    return jax.default_backend() in ("gpu", "tpu") and gpu_obstacle() is None


def path() -> str:
    """Return what runs a prepared model's ops on the default device, in words."""
    platform = jax.default_backend()
    if has_kernels():
        return f"{platform} kernels"
    return f"XLA reference: {gpu_obstacle() or f'there are no kernels for {platform}'}"


def for_inference(
    model: Decoder, kernels: Kernels, *, dtype=None, mesh: jax.sharding.Mesh | None = None
) -> tuple[Decoder, str]:
    """Return the model in the form asked for, and what will run it, in words.

    Args:
      model: stays as it is.
      kernels: `on` prepares it (see `prepare_for_inference`), `off` leaves it alone; `auto` prepares a quantised one
        where there are kernels for the device and for its group size, and on a CPU any model, with its weights unpacked
        where those take no more than half of the memory.
      dtype: what it computes in; None leaves that as it is, but takes the kernels' bfloat16 where they run.
      mesh: with axes `data` and `model` that the model is split over; None leaves it where it is.

    Raises:
      TwlaError: `on`, and the kernels have no place for its group size.
    """
    given = model if dtype is None else computing_in(model, dtype)
    if kernels == "auto" and mesh is None and runs_unpacked(given):
        words = (
            f"weights unpacked, {unpacked_bytes(given) / 1e9:.2f} GB" if _packed(given) else "merged matrices"
        )
        return prepare_for_inference(given, unpack=True), f"{REFERENCE}, {words}"
    if kernels == "off" or (kernels == "auto" and not (has_kernels() and _quantized(model))):
        return _placed(given, mesh), REFERENCE
    narrow = computing_in(model, "bfloat16") if dtype is None and has_kernels() else given
    try:
        prepared = prepare_for_inference(narrow, mesh=mesh, unpack=False)
        return prepared, path() + _outside_kernels(prepared)
    except TwlaError:
        if kernels == "on":
            raise
        return _placed(given, mesh), REFERENCE


def _placed(model: Decoder, mesh: jax.sharding.Mesh | None) -> Decoder:
    return model if mesh is None else sharding.place(model, mesh)


def _outside_kernels(model: Decoder) -> str:
    """Return what the fused kernels do not know of a prepared model's family, in words; empty where they know all."""
    shared = getattr(type(model.blocks[0]), "shared", frozenset())  # pyright: ignore[reportIndexIssue]
    if shared.issuperset({"attend", "project", "score_changes"}):
        return ""
    return f"; attention of {model.config.model_type} runs in XLA"


def _packed(model: Decoder) -> bool:
    return isinstance(model.first_kernel, PackedTensor)


def _quantized(model: Decoder) -> bool:
    return isinstance(model.first_kernel, TernaryTensor)
