"""The original's and the quantised model's continuations stand beside each other."""

from twla_jax.inference import text_generation
from twla_jax.jobs import continuations, loading


def test_every_model_continues_the_prompt_greedily_and_sampled(stories_model):
    model, tokenizer = loading.load(stories_model)
    prompt = "Once upon a time"
    rows = continuations.continue_prompt(
        {"one": model, "other": model}, tokenizer, prompt, max_new_tokens=6, temperature=0.9
    )
    assert [(row["model"], row["temperature"]) for row in rows] == [
        *(("one", 0.0), ("other", 0.0), ("one", 0.9), ("other", 0.9))
    ]
    pieces = text_generation.stream_text(model, tokenizer, prompt, max_new_tokens=6)
    assert rows[0]["text"] == rows[1]["text"] == "".join(piece for _, piece in pieces)
    assert rows[2]["text"] == rows[3]["text"]  # the same seed
    assert rows[2]["text"] != rows[0]["text"]
    printed = continuations.format_continuations(prompt, rows).splitlines()
    assert printed[0] == '"Once upon a time …"'
    assert printed[2] == "the likeliest tokens:"
    assert printed[3] == "  one"
    assert " ".join(rows[0]["text"].split()) in printed[4]
