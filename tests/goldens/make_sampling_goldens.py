"""Makes `sampling/processors.npz` from transformers' logits processors, which need torch (see make_goldens.py).

`python tests/goldens/make_sampling_goldens.py`
"""

from pathlib import Path

import numpy as np
import torch
from transformers.generation import logits_process as rules

torch.manual_seed(0)
logits = 4 * torch.randn(3, 80)
prompt = torch.randint(0, 80, (3, 12))
CASES = {
    "temperature": (rules.TemperatureLogitsWarper(0.6),),
    "top_k": (rules.TopKLogitsWarper(5),),
    "top_p": (rules.TopPLogitsWarper(0.8),),
    "min_p": (rules.MinPLogitsWarper(0.1),),
    "repetition_penalty": (rules.RepetitionPenaltyLogitsProcessor(1.4),),
    "all": (
        rules.RepetitionPenaltyLogitsProcessor(1.3),
        rules.TemperatureLogitsWarper(1.7),
        rules.TopKLogitsWarper(20),
        rules.TopPLogitsWarper(0.9),
        rules.MinPLogitsWarper(0.05),
    ),
}
found = {}
for name, steps in CASES.items():
    scores = logits.clone()
    for step in steps:
        scores = step(prompt, scores)
    found[name] = scores.numpy()
folder = Path(__file__).parent / "sampling"
np.savez_compressed(folder / "processors.npz", logits=logits.numpy(), prompt=prompt.numpy(), **found)
