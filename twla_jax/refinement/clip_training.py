"""Trains clips, the ranges of the activation quantisers, end to end, with all else as it is.

The layer-wise fit judges a clip by its own layer's output error. Here all clips for one bit-width learn together from
the KL divergence to the full-precision model's predictions, as step sizes do in LSQ (Esser et al., arXiv 1902.08153):
gradients pass the rounding of the codes straight, so a clip sees what is cut off against how coarse the rest becomes.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from twla_jax.models.arguments import checked_tokens, require_pair, require_settings
from twla_jax.models.decoder import Decoder
from twla_jax.refinement import descent, end_to_end
from twla_jax.refinement_settings import ClipTrainingSettings
from twla_jax.storage import resume


@resume.keeps_work_dir
def train_clips(
    student: Decoder,
    teacher: Decoder,
    windows: Int32[np.ndarray, "w s"],
    settings: ClipTrainingSettings,
    *,
    work_dir: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> tuple[Decoder, dict[str, Any]]:
    """Train the clips for `settings.bits`, with every linear input at these bits, over `settings.steps` steps.

    Args:
      student: quantised; its weights, norms, rotations and activation settings stay.
      teacher: the model it was quantised from.
      windows: calibration tokens, `settings.batch` a step, in order and from the start again where they run out.
      settings: of the clips' training.
      work_dir: as `refinement.refine` takes it.
      mesh: as `refinement.refine` takes it.
      progress: a bar with an estimate of the time left, on stderr.

    Returns:
      The model with other clips, and the figures of `refinement.refine`.

    Raises:
      TwlaError: two models that do not belong together, or what `checked_tokens` refuses.
    """
    require_pair(student, teacher)
    require_settings(settings, ClipTrainingSettings, "settings")
    windows = checked_tokens(windows, teacher.config, "windows")
    batches = np.resize(windows, (settings.steps, settings.batch, windows.shape[1]))
    original, dtype = student, jnp.dtype(settings.dtype)
    student, teacher = (descent.training_form(model, dtype, mesh) for model in (student, teacher))
    store = None
    if work_dir is not None:
        store = descent.open_work_dir(Path(work_dir), student, batches, settings)

    clips = {site.name: jnp.zeros(student.config.num_layers) for site in student.sites}
    latents = {f"{name}_input": {"clip": clip} for name, clip in clips.items()}
    training = end_to_end.WholeTraining(student, teacher, latents, settings, settings.bits, mesh)
    return descent.descend(
        original, training, batches, settings, store=store, progress=progress, label="train clips"
    )
