"""A tokenizer of one token a word, with BOS before a text and a chat template that writes BOS itself."""

import tokenizers
import transformers

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<role> {{ m.role }} : {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<role> assistant : {% endif %}"
)
SPECIAL = ["<s>", "</s>", "<role>", "<end>"]


def chat_tokenizer(size=97, template=TEMPLATE):
    words = [*SPECIAL, ":", "user", "assistant", "system", "question", "answer", "<unk>"]
    words += [f"w{i}" for i in range(size - len(words))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.decoder = tokenizers.decoders.Fuse()
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    tokenizer.chat_template = template
    return tokenizer
