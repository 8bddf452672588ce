"""Chats as token ids: as the template writes them, BOS once, and the token that ends an answer."""

import pytest

from twla_jax.errors import TwlaError
from twla_jax.text import chat, corpora
from twla_jax.text.files import from_documents

from helpers.chat_tokenizer import TEMPLATE, chat_tokenizer

SAID = [{"role": "user", "content": "w1"}]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def test_a_chat_has_the_ids_of_its_parts_and_one_bos(tokenizer):
    words = ["<s>", "<role>", "user", ":", "w1", "<end>", "<role>", "assistant", ":"]
    assert chat.encode_chat(tokenizer, SAID) == tokenizer.convert_tokens_to_ids(words)
    assert chat.encode_chat(tokenizer, SAID, answer=False) == tokenizer.convert_tokens_to_ids(words[:6])
    assert chat.encode_chat(tokenizer, SAID) == tokenizer.apply_chat_template(
        SAID, add_generation_prompt=True, tokenize=True, return_dict=False
    )


@pytest.mark.parametrize("text", ["w1 w2", "<s> w1 w2"])
def test_a_text_begins_with_one_bos_whether_it_has_it_or_not(tokenizer, text):
    assert chat.encode_text(tokenizer, text) == tokenizer.convert_tokens_to_ids(["<s>", "w1", "w2"])


def test_half_a_character_is_refused(tokenizer):
    for encode in (chat.encode_text, chat.encode_rendered):
        with pytest.raises(TwlaError, match="half a surrogate pair"):
            encode(tokenizer, "w1 \ud83d")


def test_what_follows_an_answer_in_the_template_ends_it(tokenizer):
    assert chat.ends_of_answer(tokenizer, (1,)) == (1, 3)
    assert chat.ends_of_answer(tokenizer, (3,)) == (3,)
    plain = chat_tokenizer(template="{% for m in messages %}{{ m.role }} : {{ m.content }} w1 {% endfor %}")
    assert chat.ends_of_answer(plain, (1,)) == (1,)  # an ordinary word ends nothing
    assert chat.ends_of_answer(chat_tokenizer(template=None), (1,)) == (1,)


def test_a_template_that_breaks_is_one_line(tokenizer):
    broken = chat_tokenizer(template="{{ messages[0].content.nothing.at_all }}")
    with pytest.raises(TwlaError, match=r"does not take these messages \(user\)") as error:
        chat.encode_chat(broken, SAID)
    assert "\n" not in str(error.value)


def test_chats_to_calibrate_on_have_the_bos_of_their_template_alone(tokenizer):
    text = from_documents([tuple(SAID), tuple(SAID)], "here")
    corpus = corpora.Corpus(name="c", split="calibration", text=text.text, source="here", chats=text.chats)
    ids = corpora.tokenize(corpus, tokenizer, 97)
    one = chat.encode_chat(tokenizer, SAID, answer=False)
    assert ids.bos == one[0]
    assert list(ids) == [*one[1:], *one]  # every window begins with BOS itself
    assert TEMPLATE.count("bos_token") == 1
