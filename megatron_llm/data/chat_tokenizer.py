"""The chat side of a tokenizer: its template, and the ids that end a reply under it.

`prepare/chat.py` and `prepare/render.py` render training data with it; generation asks `reply_end_ids` where to stop, so that
what is trained to end a reply and what ends one are the same. transformers is imported by the loader only.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from megatron_llm.data.tokenizer import load_pretrained

PROBE = "\ue000\ue001"  # a text that no template and no conversation holds


def load_chat_tokenizer(folder: str | Path, template: str | None = None) -> Any:
    """The transformers tokenizer of a folder, with `template` (Jinja text) instead of its own chat template if given.

    Raises ValueError if it cannot render conversations or trace tokens to text.
    """
    tokenizer = load_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise ValueError(f"{folder} has no chat template; put a chat_template.jinja into the folder, or name one with --template")
    if not tokenizer.is_fast:
        raise ValueError(f"{folder} has no fast tokenizer, so tokens cannot be traced to text; save it with tokenizer.json")
    tokenizer.model_max_length = 1 << 60  # only a warning depends on it; long records are training's decision
    return tokenizer


def special_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that the tokenizer calls special."""
    return [id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special]


def reply_end_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens with which the chat template ends a reply: `<|im_end|>`, `</s>`, ...; empty if it writes none.

    Found by rendering a reply and a reply that calls a tool: the first special token after the text of the one, and the last
    one of the other (Llama 3's `<|eom_id|>`, for instance, ends calls only). The tokenizer's eos token is among them only if
    the template writes it. Empty without a chat template, too.
    """
    if not tokenizer.chat_template:
        return frozenset()
    special = {*special_ids(tokenizer), tokenizer.eos_token_id}
    user = {"role": "user", "content": "a"}
    called = {"type": "function", "id": "123456789", "function": {"name": PROBE, "arguments": {"x": 1}}}
    found: set[int] = set()
    text = _rendered(tokenizer, [user, {"role": "assistant", "content": PROBE}])
    if PROBE in text:
        ids = tokenizer(text.rpartition(PROBE)[2], add_special_tokens=False)["input_ids"]
        found.update([id_ for id_ in ids if id_ in special][:1])
    text = _rendered(tokenizer, [user, {"role": "assistant", "content": "", "tool_calls": [called]}])
    if PROBE in text:  # else the template has no calls
        ids = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
        found.update(id_ for id_ in ids[-1:] if id_ in special)
    return frozenset(found)


def _rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """The conversation as text; empty if the template refuses it, as some refuse calls."""
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except template_errors():
        return ""
    return text


@functools.cache
def template_errors() -> tuple[type[Exception], ...]:
    """What a template may raise: its own refusals, and what Jinja and Python say about fields that are not there."""
    import jinja2

    return (jinja2.TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, ValueError)
