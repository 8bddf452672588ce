"""Writes what lm-evaluation-harness's own transformers model answers, for `tests/evaluation/test_harness.py`.

Needs PyTorch, transformers, lm_eval[hf]; FOLDER holds stories260K with the tokenizer that `stories_model` of
`tests/conftest.py` gives it:

    python tests/goldens/make_harness.py FOLDER tests/goldens/harness.json
"""

import json
import sys
from types import SimpleNamespace

from lm_eval.models.huggingface import HFLM

LONG = "Once upon a time, there was a little girl who liked to play in the park. She had a red ball. " * 12
PAIRS = [
    ("Once upon a time, there was a little", " girl"),
    ("Once upon a time, there was a little ", "boat that"),
    ("", "The end."),
    ("Tom and his mom went to the park. They saw a big", " dog."),
    ("Tom and his mom went to the park. They saw a big", " tree and sat under it to eat their lunch."),
    ("Lily said,", ' "I want to play with you!"'),
    (LONG, " One day"),
]
TEXTS = ["The cat sat on the mat.", "", LONG]
CONTEXTS = ["Once upon a time", "One day, a big dog", "Lily and Tom"]
SETTINGS = [
    {"until": ["."], "max_gen_toks": 40, "do_sample": False},
    {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
]


def main(folder: str, out: str) -> None:
    """Write the answers."""
    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=4)
    requests = [SimpleNamespace(args=pair) for pair in PAIRS]
    rolling = [SimpleNamespace(args=(text,)) for text in TEXTS]
    generated = [SimpleNamespace(args=(text, dict(each))) for text in CONTEXTS for each in SETTINGS]
    found = {
        "loglikelihood": [
            [*r.args, *answer] for r, answer in zip(requests, model.loglikelihood(requests), strict=True)
        ],
        "rolling": [
            [*r.args, answer] for r, answer in zip(rolling, model.loglikelihood_rolling(rolling), strict=True)
        ],
        "generate": [
            [*r.args, answer] for r, answer in zip(generated, model.generate_until(generated), strict=True)
        ],
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1, ensure_ascii=False)
        file.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
