"""Samples text from the model itself, at temperature 1 and past the ends of its texts (LLM-QAT, arXiv 2305.17888).

`sample_text` is for users who have no text: every row begins with the model's BOS token, or a random one where it has
none. Rows are windows as they are: calibration, refinement and held-out text each take rows of their own.
`continue_windows` goes on from the beginnings of a user's text.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from twla_jax.devices import on_device
from twla_jax.inference import generation
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.limits import check_number
from twla_jax.models.arguments import checked_tokens, require_model
from twla_jax.models.config import DecoderConfig, check_length
from twla_jax.models.decoder import Decoder, computing_in
from twla_jax.progress import Bar
from twla_jax.storage import resume

_CACHE_SHARE = 0.2  # of the device's memory, that keys and values may take
_CACHE_BYTES = 4e9  # the same where the memory is not known
_CPU_BATCH, _BATCH = 8, 64  # rows at a time, at most
_PIECE_BATCH = 1024  # the same for pieces, which are short
_PIECE, _GIVEN = 512, 32  # tokens of a piece of a window, and the first of them, which stay the text's own


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
    batch = _batch(config, seq_len, _BATCH)
    store = None
    if work_dir is not None:
        settings = {"config": config.to_dict(), "seq_len": seq_len, "seed": seed, "batch": batch}
        store = _open_work_dir(Path(work_dir), settings, resume.leaves(model))
    start = functools.partial(_first_tokens, config, batch, seed)
    return _sampled(model, rows, seq_len, start, seed, store, progress=progress)


@resume.keeps_work_dir
def continue_windows(
    model: Decoder,
    windows: Int32[np.ndarray, "w s"],
    *,
    seed: int = 0,
    seconds: float | None = None,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> Int32[np.ndarray, "w s"]:
    """Return windows of which the model has written most: of every 512 tokens, all but the first 32.

    Text of many kinds thus becomes as much text of the same kinds as is wanted, in the model's own words. Short pieces
    are sampled many at a time, which takes an accelerator a tenth of the time.

    Args:
      model: full precision or quantised.
      windows: of the text to begin from.
      seed: of the sampling.
      seconds: the most that may be spent, by the clock; what is left when they are over stays as it is. None for all.
      work_dir: finished batches are kept here; a later call with the same arguments goes on from them.
      progress: a bar with an estimate of the time left, on stderr.

    Raises:
      TwlaError: windows that `checked_tokens` refuses, a number that is out of its range, or the folder is another's.
    """
    require_model(model)
    check_number("seed", seed)
    windows = checked_tokens(windows, model.config, "windows")
    pieces = max(1, windows.shape[1] // _PIECE)
    length = windows.shape[1] // pieces
    texts = windows[:, : pieces * length].reshape(-1, length)
    given = min(_GIVEN, length // 2)
    if not given:
        return windows
    batch = _batch(model.config, length, _PIECE_BATCH)
    store = None
    if work_dir is not None:
        settings = {"config": model.config.to_dict(), "seed": seed, "batch": batch}
        store = _open_work_dir(Path(work_dir), settings, [windows, *resume.leaves(model)])

    def start(index: int) -> Int32[np.ndarray, "batch given"]:
        rows = np.arange(index * batch, (index + 1) * batch) % len(texts)
        return texts[rows, :given]

    sampled = _sampled(model, len(texts), length, start, seed, store, seconds=seconds, progress=progress)
    result = windows.copy()
    result[:, : pieces * length] = np.concatenate([sampled, texts[len(sampled) :]]).reshape(len(windows), -1)
    return result


def _sampled(
    model: Decoder,
    rows: int,
    seq_len: int,
    start: Callable[[int], Int32[np.ndarray, "batch begun"]],
    seed: int,
    store: resume.WorkDir | None,
    *,
    seconds: float | None = None,
    progress: bool,
) -> Int32[np.ndarray, "rows seq_len"]:
    """Return rows that go on from `start` of each batch; fewer of them if the seconds are over."""
    done: list[np.ndarray] = []
    prepared, begun, batches = None, time.perf_counter(), -(-rows // len(start(0)))
    if store and (plan := store.load("batches")):  # of an earlier call, whose text must come again
        batches, seconds = int(plan["batches"]), None
    with Bar(total=rows, desc="sample", unit="row", disable=not progress) as bar:
        for index in range(batches):
            saved = store.load(f"batch-{index}") if store else None
            if saved is None:
                if seconds is not None and time.perf_counter() - begun > seconds:
                    break
                prepared = _prepared(model) if prepared is None else prepared
                saved = {"tokens": _sample_batch(prepared, start(index), seq_len, seed, index)}
                if store:
                    store.save(f"batch-{index}", saved)
            done.append(saved["tokens"])
            bar.update(min(len(done[-1]), rows - bar.n))
    if store and seconds is not None:
        store.save("batches", {"batches": np.asarray(len(done))})
    return np.concatenate(done or [np.zeros((0, seq_len), np.int32)])[:rows]


def _batch(config: DecoderConfig, seq_len: int, most: int) -> int:
    """Return how many rows are sampled at a time: a power of two that the cache has room for."""
    batch = _CPU_BATCH if jax.default_backend() == "cpu" else most
    room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    room = _CACHE_BYTES if room is None else _CACHE_SHARE * room
    row_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * seq_len
    while batch > 1 and batch * row_bytes > room:
        batch //= 2
    return batch


def _prepared(model: Decoder) -> Decoder:
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return prepare_for_inference(on_device(computing_in(model, dtype)))


def _keys(seed: int, index: int) -> jax.Array:
    """Return the keys of a batch: of its first tokens, and of those that follow."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), index))


def _first_tokens(config: DecoderConfig, batch: int, seed: int, index: int) -> Int32[np.ndarray, "batch 1"]:
    if config.bos_token_id is not None:
        return np.full((batch, 1), config.bos_token_id, np.int32)
    first, _ = _keys(seed, index)
    return np.asarray(jax.random.randint(first, (batch, 1), 0, config.vocab_size), np.int32)


def _sample_batch(
    model: Decoder, start: Int32[np.ndarray, "batch begun"], seq_len: int, seed: int, index: int
) -> Int32[np.ndarray, "batch seq_len"]:
    _, following = _keys(seed, index)
    settings = {"temperature": 1.0, "key": following, "eos_token_ids": ()}
    rest = generation.generate(model, start, max_new_tokens=seq_len - start.shape[1], **settings)
    return np.concatenate([start, rest], axis=1)


def _open_work_dir(folder: Path, settings: dict[str, Any], arrays: list[Any]) -> resume.WorkDir:
    return resume.WorkDir(folder, resume.fingerprint(settings, arrays))
