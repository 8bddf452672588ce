"""Measures what ILA-AMP chooses by: the loss with one site, or two neighbours, at fewer bits than the rest.

All other sites stay at the highest choice, the base. What an evaluation shares with others up to its changed sites is
computed once: the state before a site at the base, and the states after its left neighbour at each of the other bits.
From each of these the site is run at every bit, and the results go together through the rest of the model. So any two
assignments of bits share every block before the first site where they differ, which is all that exact losses can share:
`6L² − 2L` block runs for L blocks and 4 choices, where evaluations from the first block on would take `12L² − 8L`.
"""

import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from twla_jax import hosts
from twla_jax.core.activation import ActivationQuantizer
from twla_jax.core.ila_amp import SensitivityTable
from twla_jax.evaluation.nll import hidden_nll
from twla_jax.models import sharding
from twla_jax.models.blocks import ChainBlock, Context, State, run
from twla_jax.models.config import check_vocabulary
from twla_jax.models.decoder import Decoder
from twla_jax.models.sites import (
    SiteKind,
    require_quantizers,
    site_spans,
    with_input_bits,
    with_site_bits,
    work_shares,
)
from twla_jax.progress import Bar
from twla_jax.storage import resume

# Tokens of all candidates that go through the model together: three of 8 windows of 2048.
_CALL_TOKENS = 49152
_LOGIT_TOKENS = 8192  # of these, how many have their logits at the same time


@resume.keeps_work_dir
def measure(
    model: Decoder,
    windows: Int32[np.ndarray, "w s"],
    kind: SiteKind,
    choices: tuple[int, ...],
    *,
    work_dir: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> SensitivityTable:
    """Return the sensitivity table of a quantised model, from mean losses over `windows`.

    There are `(c − 1)·L + (c − 1)²·(L − 1) + 1` of them, for c choices and L sites.

    Args:
      model: its activation bits are not read; its clips are.
      windows: held-out windows of calibration text, from `calibration.held_out_windows`.
      kind: what is a site.
      choices: bits, ascending; the last is the base.
      work_dir: the losses of each finished site are kept in a folder of this one, named by the `fingerprint`; a later
        call goes on after them.
      mesh: with axes `data`, over which the windows are split, and `model`.
      progress: a bar with an estimate of the time left, on stderr.

    Returns:
      The table. Its `effort` holds `loss_evaluations`; `block_evaluations`, how often a block ran over all windows
      (where a site is one input, a part of a block counts by its share of the multiply-adds); the same for evaluations
      that run every block, `naive_block_evaluations`; and `seconds`, compilation included.

    Raises:
      TwlaError: a model that was not quantised, a token outside the vocabulary, or a loss that is not finite.
    """
    require_quantizers(model)
    check_vocabulary(windows, model.config.vocab_size)
    store = None
    if work_dir is not None:
        identity = fingerprint(model, windows, kind, choices)
        store = resume.WorkDir(Path(work_dir) / identity[:16], identity)
    layers = model.config.num_layers
    model = with_input_bits(
        sharding.place(model, mesh), np.full((layers, len(model.sites)), choices[-1], np.int32)
    )
    count, seq_len = windows.shape
    lower = np.asarray(choices[:-1], np.int32)
    # On a mesh, windows that only fill up a batch count for nothing.
    filled = sharding.batch_on(mesh, count)
    devices = sharding.batch_on(mesh, 1)
    size = devices * _batch_size(filled // devices, seq_len * len(lower))
    real = (np.arange(filled) < count).reshape(-1, size)
    padded = np.pad(windows, ((0, filled - count), (0, 0))).reshape(-1, size, seq_len)
    batches = [sharding.place_batch(batch, mesh) for batch in padded]
    shares = work_shares(model, seq_len)

    results: list[dict[str, np.ndarray]] = []
    while store and (saved := store.load_for_all(f"site-{len(results)}")):
        results.append(saved)
    base = [State(sharding.place_batch(model.embed_tokens(batch), mesh)) for batch in batches]
    varied: list[list[State]] = [[] for _ in batches]
    sites = [(layer, *span) for layer in range(layers) for span in site_spans(model, kind)]
    start = time.perf_counter()
    blocks = 0.0
    with Bar(
        total=len(sites), initial=len(results), desc="sensitivity", unit="site", disable=not progress
    ) as bar:
        for site, (layer, first, last) in enumerate(sites):
            measured = site >= len(results)
            remaining = shares[first:].sum() + layers - layer - 1
            losses = []
            # An earlier run has the losses of finished sites; the last of them must still vary for its neighbour.
            for index, batch in enumerate(batches if site + 1 >= len(results) else ()):
                incoming = [base[index], *varied[index]] if measured else [base[index]]
                outgoing = [_vary(model, state, layer, lower, first=first, last=last) for state in incoming]
                varied[index] = [
                    jax.tree.map(lambda leaf, i=i: leaf[i], outgoing[0]) for i in range(len(lower))
                ]
                if measured:
                    losses.append([_losses(model, state, layer, last, batch) for state in outgoing])
            if measured:
                blocks += len(losses[0]) * len(lower) * remaining
            base = [_advance(model, state.x, state.inner, layer, first=first, last=last) for state in base]
            if measured:  # what is only run again after an interrupt is no part of the measurement
                blocks += shares[first:last].sum()
                now = time.perf_counter()
                results.append(
                    {
                        "losses": _mean(losses, real, count),
                        "blocks": np.asarray(blocks),
                        "seconds": np.asarray(now - start),
                    }
                )
                start, blocks = now, 0.0
                if store:
                    store.save_once(f"site-{site}", results[-1])
                bar.update()
    # As many copies of the base as there are candidates elsewhere: the same shapes, nothing compiled for it.
    base_losses = [
        _losses(
            model,
            jax.tree.map(lambda leaf: jnp.stack([leaf] * len(lower)), state),
            layers - 1,
            len(model.sites),
            batch,
        )
        for state, batch in zip(base, batches, strict=True)
    ]
    evaluations = 1 + sum(result["losses"].size for result in results)
    return SensitivityTable.from_losses(
        choices,
        float(_mean([[losses] for losses in base_losses], real, count)[0, 0]),
        np.stack([result["losses"][0] for result in results]),
        np.asarray([result["losses"][1:] for result in results[1:]]).reshape(-1, len(lower), len(lower)),
        {
            "loss_evaluations": evaluations,
            "block_evaluations": round(float(sum(result["blocks"] for result in results)), 2),
            "naive_block_evaluations": evaluations * layers,
            "seconds": float(sum(result["seconds"] for result in results)),
        },
    )


def _mean(
    losses: list[list[Float[Array, "c b"]]], real: Bool[np.ndarray, "batches b"], count: int
) -> Float[np.ndarray, "states c"]:
    """Return means over the `count` real windows, from the losses of each batch, state and candidate."""
    found = np.asarray(hosts.fetch(losses), np.float64)
    return np.where(real[:, None, None], found, 0).sum((0, -1)) / count


def fingerprint(
    model: Decoder, windows: Int32[np.ndarray, "w s"], kind: SiteKind, choices: tuple[int, ...]
) -> str:
    """Return a digest of what a table depends on: weights, clips, windows, sites, choices; not the present bits."""
    settings = {
        "config": model.config.to_dict(),
        "dtype": model.dtype.name,
        "site": kind,
        "choices": list(choices),
    }
    leaves = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, ActivationQuantizer))
    arrays = (leaf.clips if isinstance(leaf, ActivationQuantizer) else leaf for leaf in leaves)
    return resume.fingerprint(settings, map(hosts.fetch, [windows, *arrays]))


def _batch_size(count: int, tokens: int) -> int:
    """Return how many windows go at a time, a divisor of `count`; each is `tokens` long with its candidates."""
    return next(n for n in range(count, 0, -1) if count % n == 0 and (n * tokens <= _CALL_TOKENS or n == 1))


@functools.partial(jax.jit, static_argnames=("first", "last"))
def _vary(
    model: Decoder, state: State, layer: Int32[Array, ""], bits: Int32[Array, " c"], *, first: int, last: int
) -> State:
    """Return the state after a site, stacked over `bits`, from the one before it."""
    block, context = _layer(model, layer, state.x)

    def at(one: Int32[Array, ""]) -> State:
        return run(with_site_bits(block, (first, last), one), state, context, first, last)

    return jax.lax.map(at, bits)


@functools.partial(jax.jit, static_argnames=("first", "last"), donate_argnames="x")
def _advance(
    model: Decoder,
    x: Float[Array, "b t d"],
    inner: Float[Array, "b t m"] | None,
    layer: Int32[Array, ""],
    *,
    first: int,
    last: int,
) -> State:
    """Return the state after a site at the base bits."""
    block, context = _layer(model, layer, x)
    return run(block, State(x, inner), context, first, last)


def _losses(
    model: Decoder, states: State, layer: int, site: int, windows: Int32[Array, "b t"]
) -> Float[Array, "c b"]:
    """Return mean negative log-likelihoods from states, stacked over candidates, that have come to a site."""
    state = _window_by_window(states)
    if site < len(model.sites):
        state = _advance(model, state.x, state.inner, layer, first=site, last=len(model.sites))
    return _suffix(model, state.x, layer + 1, windows).reshape(len(windows), -1).T


@jax.jit
def _window_by_window(states: State) -> State:
    """Return states stacked over candidates as one batch, those of a window together, as they are on its device."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), states)


@jax.jit
def _suffix(
    model: Decoder, x: Float[Array, "bc t d"], layer: Int32[Array, ""], windows: Int32[Array, "b t"]
) -> Float[Array, " bc"]:
    """Return losses from the inputs of block `layer`; one program for all layers, which runs no block before it."""

    def step(index: Int32[Array, ""], x: Float[Array, "bc t d"]) -> Float[Array, "bc t d"]:
        block, context = _layer(model, index, x)
        return block(x, context)

    x = jax.lax.fori_loop(layer, model.config.num_layers, step, x)
    targets = jnp.repeat(windows, len(x) // len(windows), axis=0)
    predictions = x.shape[1] - 1
    chunk = -(-predictions // max(1, round(len(x) * predictions / _LOGIT_TOKENS)))
    return hidden_nll(model, model.norm(x), targets, chunk=chunk)


def _layer(model: Decoder, layer: Int32[Array, ""], x: Float[Array, "b t d"]) -> tuple[ChainBlock, Context]:
    """Return a block and its context."""
    block = jax.tree.map(lambda leaf: leaf[layer], model.blocks)
    return block, model.context(x.shape[1]).layer(layer)
