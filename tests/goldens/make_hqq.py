"""Writes exports/hqq.npz: what the hqq package saves of a 2-bit linear, and what it makes of it again.

    python tests/goldens/make_hqq.py      # Python 3.11, torch 2.13.0, hqq 0.2.8.post1 (--no-deps), termcolor

Codes, scales and zero points are random; all that the package adds to them is in the file as `state.…`.
"""

from pathlib import Path

import numpy as np
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

N, M, GROUP = 8, 96, 32

rng = np.random.default_rng(0)
codes = rng.integers(-1, 2, (N, M)).astype(np.int8)
alpha = rng.uniform(0.01, 0.1, (N, M // GROUP)).astype(np.float16)
mu = rng.normal(0, 0.05, (N, M // GROUP)).astype(np.float16)
alpha[2, 1], codes[2, GROUP : 2 * GROUP] = 0, 0

held = HQQLinear(
    torch.nn.Linear(M, N, bias=False),
    BaseQuantizeConfig(nbits=2, group_size=GROUP, axis=1),
    compute_dtype=torch.float32,
    device="cpu",
)
scale = np.where(alpha == 0, 1.0, alpha.astype(np.float64)).reshape(-1, 1)
zero = np.where(
    alpha.reshape(-1, 1) == 0, -mu.astype(np.float64).reshape(-1, 1), 1 - mu.reshape(-1, 1) / scale
)
fields = torch.tensor(np.where(alpha.reshape(-1, 1) == 0, 0, codes.reshape(-1, GROUP) + 1))
held.W_q.data = Quantizer.pack["2bit_u8"](fields)
held.quant_config["weight_quant_params"]["optimize"] = False  # by the package's own solver, that is
held.meta |= {
    "scale": torch.tensor(scale, dtype=torch.float32),
    "zero": torch.tensor(zero, dtype=torch.float32),
}
state = {f"state.{name}": value.numpy() for name, value in held.state_dict().items()}
again = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
again.load_state_dict(dict(held.state_dict()))
np.savez_compressed(
    Path(__file__).parent / "exports" / "hqq.npz",
    codes=codes,
    alpha=alpha,
    mu=mu,
    dense=again.dequantize().numpy(),
    **state,
)
