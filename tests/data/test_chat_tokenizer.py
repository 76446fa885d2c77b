"""What ends a reply, by the templates that people use."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_llm.data.chat_tokenizer import reply_end_ids

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
EACH = "{% for m in messages %}"
TEMPLATES = {
    "chatml": (EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", "<|im_end|>"),
    "llama 2": (
        EACH + "{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        "</s>",
    ),
    "two ends": (EACH + "<|im_start|>{{ m.content }}<|eot|><|im_end|>{% endfor %}", "<|eot|>"),
    "trimmed and quoted": (EACH + "<|im_start|>{{ m.content | trim }}\n\n<|im_end|>{% endfor %}<s>", "<|im_end|>"),
    "text only": (EACH + "{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    "text, and then a token": (EACH + "{{ m.content }} END <|im_end|>{% endfor %}", "<|im_end|>"),
    "refuses": ("{{ raise_exception('a system message is needed') }}", None),
    "silent": ("<s>", None),
}  # fmt: skip


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "probe": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_token_that_ends_a_reply(name: str) -> None:
    tokenizer = _tokenizer()
    template, token = TEMPLATES[name]
    assert reply_end_ids(tokenizer) == frozenset(), "without a template"
    tokenizer.chat_template = template
    assert reply_end_ids(tokenizer) == frozenset(() if token is None else (tokenizer.convert_tokens_to_ids(token),))
