"""Samples calibration text from the model itself, for users who have none (LLM-QAT, arXiv 2305.17888).

Every row begins with the model's BOS token, or a random one where it has none, and goes on at temperature 1, past the
ends of its texts. Rows are windows as they are: calibration, refinement and held-out text each take rows of their own.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from twla_jax.devices import on_device
from twla_jax.inference import generation
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.limits import check_number
from twla_jax.models.arguments import require_model
from twla_jax.models.config import check_length
from twla_jax.models.decoder import Decoder, computing_in
from twla_jax.progress import Bar
from twla_jax.storage import resume

_CACHE_BYTES = 4e9  # of keys and values, at most, which bounds the rows at a time
_MAX_BATCH = {"cpu": 8}
_MAX_BATCH_ELSEWHERE = 64


@resume.keeps_work_dir
def sample_text(
    model: Decoder,
    rows: int,
    seq_len: int,
    *,
    seed: int = 0,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> Int32[np.ndarray, "rows seq_len"]:
    """Sample `rows` windows of `seq_len` tokens from a model; the same seed gives the same on the same device.

    On an accelerator the model computes in bfloat16. The first rows do not depend on how many follow.

    Args:
      model: full precision or quantised.
      rows: windows to sample.
      seq_len: tokens in a window.
      seed: of the sampling.
      work_dir: finished batches are kept here; a later call for the same model, length and seed goes on from them.
      progress: a bar with an estimate of the time left, on stderr.

    Raises:
      TwlaError: a number is out of its range, `seq_len` exceeds the model's positions, or the folder is another's.
    """
    require_model(model)
    for name, value in (("rows", rows), ("seq_len", seq_len), ("seed", seed)):
        check_number(name, value)
    config = model.config
    check_length(seq_len, config)
    batch = _batch(config, seq_len)
    store = None if work_dir is None else _open_work_dir(Path(work_dir), model, seq_len, seed, batch)
    done: list[np.ndarray] = []
    prepared = None
    with Bar(total=rows, desc="sample", unit="window", disable=not progress) as bar:
        for index in range(-(-rows // batch)):
            saved = store.load(f"batch-{index}") if store else None
            if saved is None:
                prepared = _prepared(model) if prepared is None else prepared
                saved = {"tokens": _sample_batch(prepared, batch, seq_len, seed, index)}
                if store:
                    store.save(f"batch-{index}", saved)
            done.append(saved["tokens"])
            bar.update(min(batch, rows - bar.n))
    return np.concatenate(done)[:rows]


def _batch(config: Any, seq_len: int) -> int:
    """Return how many rows are sampled at a time: a power of two that the cache has room for."""
    most = _MAX_BATCH.get(jax.default_backend(), _MAX_BATCH_ELSEWHERE)
    row_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * seq_len
    batch = most
    while batch > 1 and batch * row_bytes > _CACHE_BYTES:
        batch //= 2
    return batch


def _prepared(model: Decoder) -> Decoder:
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return prepare_for_inference(on_device(computing_in(model, dtype)))


def _sample_batch(
    model: Decoder, batch: int, seq_len: int, seed: int, index: int
) -> Int32[np.ndarray, "batch seq_len"]:
    first, following = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
    bos, size = model.config.bos_token_id, model.config.vocab_size
    if bos is None:
        start = np.asarray(jax.random.randint(first, (batch, 1), 0, size), np.int32)
    else:
        start = np.full((batch, 1), bos, np.int32)
    settings = {"temperature": 1.0, "key": following, "eos_token_ids": ()}
    rest = generation.generate(model, start, max_new_tokens=seq_len - 1, **settings)
    return np.concatenate([start, rest], axis=1)


def _open_work_dir(folder: Path, model: Decoder, seq_len: int, seed: int, batch: int) -> resume.WorkDir:
    settings = {"config": model.config.to_dict(), "seq_len": seq_len, "seed": seed, "batch": batch}
    return resume.WorkDir(folder, resume.fingerprint(settings, resume.leaves(model)))
