"""Descent by groups after the sweep, against every change of a single code in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import gptq, tensors
from twla_jax.core.settings import CompensationSettings, TernarySettings, TwoPlaneSettings, WeightSettings

N, M, TOKENS, GROUP = 12, 40, 400, 16  # the last group is short
DAMPING = 0.01


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, M)) @ (np.eye(M) + 0.3 * rng.normal(size=(M, M)))
    return rng.standard_t(5, (N, M)).astype(np.float32), (x.T @ x).astype(np.float32)


def quantized(layer, quantizer, passes):
    settings = WeightSettings(
        quantizer=quantizer,
        group_size=GROUP,
        compensation=CompensationSettings(damping=DAMPING, passes=passes),
    )
    weight, moment = (jnp.asarray(each) for each in layer)
    return gptq.quantize_matrix(weight, moment, jnp.float32(TOKENS), settings=settings)


@pytest.mark.parametrize("quantizer", [TernarySettings(rounds=1), TwoPlaneSettings(rounds=1)])
def test_many_passes_end_where_no_single_code_could_be_better(layer, quantizer):
    weight, moment = (each.astype(np.float64) for each in layer)
    h = moment / TOKENS
    h += DAMPING * np.diag(h).mean() * np.eye(M)
    tensor, figures = quantized(layer, quantizer, 40)
    values = np.asarray(tensors.dequantize(tensor), np.float64)

    def cost(values):
        return np.einsum("ni,ij,nj->n", weight - values, h, weight - values)

    levels = levels_of(tensor)
    changes = 0
    for column in range(M):
        for level in levels[:, column // GROUP].T:
            other = values.copy()
            other[:, column] = level
            changes += (cost(other) < cost(values) * (1 - 1e-4)).sum()
    assert changes <= 0.01 * N * M  # scales move once more after the last codes
    assert figures["output_error"] < 0.9 * quantized(layer, quantizer, 0)[1]["output_error"]


def levels_of(tensor):
    """Return every value that a weight can have, `[n, groups, levels]`."""
    alpha = np.asarray(tensor.alpha, np.float64)[..., None]
    second = (
        0.0 if tensor.residual_alpha is None else np.asarray(tensor.residual_alpha, np.float64)[..., None]
    )
    codes = np.array(
        [[a, b] for a in (-1, 0, 1) for b in ((0,) if tensor.residual_alpha is None else (-1, 0, 1))]
    )
    return alpha * codes[:, 0] + second * codes[:, 1] + np.asarray(tensor.offsets(), np.float64)[..., None]
