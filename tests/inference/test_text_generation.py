"""Text from tokens: pieces add up to the whole, and stop texts end it however they are cut."""

import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx
from hypothesis import example, given
from hypothesis import strategies as st

from twla_jax.errors import TwlaError
from twla_jax.inference import text_generation
from twla_jax.inference.sampling import Sampling
from twla_jax.inference.text_generation import Detokenizer, StopTexts, read_text
from twla_jax.models.decoder import Decoder

from helpers.chat_tokenizer import chat_tokenizer


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte, so that letters beyond ASCII come in several."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def test_letters_of_several_tokens_come_out_whole(byte_tokenizer):
    text = "naïve 中文 😀 end"
    detokenizer = Detokenizer(byte_tokenizer)
    pieces = [detokenizer.push(token) for token in byte_tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert max(map(len, pieces)) == 1


def test_bytes_that_are_no_text_do_not_hold_up_what_follows(byte_tokenizer):
    ids = byte_tokenizer("ab")["input_ids"]
    start_of_two = byte_tokenizer("é")["input_ids"][0]
    detokenizer = Detokenizer(byte_tokenizer)
    text = "".join(detokenizer.push(token) for token in [ids[0], *[start_of_two] * 9, ids[1]])
    assert text.startswith("a\ufffd")
    assert text.endswith("b")


@example(parts=["𖡝\U0001cc00".encode()], size=1)
@given(st.lists(st.binary(max_size=6) | st.text(max_size=3).map(str.encode), max_size=6), st.integers(1, 7))
def test_tokens_together_give_the_text_that_they_give_one_by_one(byte_tokenizer, parts, size):
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    ids = [byte % len(letters) for part in parts for byte in part]
    one_by_one, together = Detokenizer(byte_tokenizer), Detokenizer(byte_tokenizer)
    expected = "".join(map(one_by_one.push, ids))
    found = "".join(together.push_all(ids[i : i + size]) for i in range(0, len(ids), size))
    assert found == expected


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_a_text_ends_before_the_first_stop_text(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stopping, found = StopTexts(stops), ""
    for piece in pieces:
        found += stopping.push(piece)
        if stopping.reached:
            break
    # By definition: the shortest beginning of the text that holds a stop text is cut before it.
    ends = [end for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)]
    if not ends:
        assert not stopping.reached
        assert found + stopping.rest() == text
        return
    assert stopping.reached
    assert not any(stop in found for stop in stops)
    assert any(text.startswith(found + stop) for stop in stops)


def test_what_a_stop_text_might_be_is_given_out_with_the_last_token():
    class Letters:
        def decode(self, ids, **_):
            return "".join(chr(i) for i in ids)

    pairs = list(read_text(map(ord, "abcab"), Detokenizer(Letters()), StopTexts(["abd"])))
    assert [token for token, _ in pairs] == list(map(ord, "abcab"))
    assert "".join(piece for _, piece in pairs) == "abcab"
    pairs = list(read_text(map(ord, "xabdy"), Detokenizer(Letters()), StopTexts(["abd"])))
    assert [chr(token) for token, _ in pairs] == list("xabd")  # no token after the stop text
    assert "".join(piece for _, piece in pairs) == "x"


@pytest.mark.parametrize("stop", ["", "x" * 5000])
def test_a_stop_text_that_is_none_is_refused(stop):
    with pytest.raises(TwlaError, match="1 to 4096 characters"):
        StopTexts([stop])


def test_samples_side_by_side_end_where_single_ones_do(tiny_config):
    model, tokenizer = Decoder(tiny_config, rngs=nnx.Rngs(0)), chat_tokenizer()
    settings = {"max_new_tokens": 8, "sampling": Sampling(temperature=1.0, seed=3)}
    texts, rows = text_generation.sample_texts(model, tokenizer, "w1 w2", samples=2, **settings)
    assert texts == [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert texts[0] != texts[1]
    word = texts[0][texts[0].index("w", 3) :][:3]
    stopped, rows = text_generation.sample_texts(
        model, tokenizer, "w1 w2", samples=2, stop=[word], **settings
    )
    assert stopped[0] == texts[0].partition(word)[0]
    np.testing.assert_array_less(len(rows[0]), 9)
