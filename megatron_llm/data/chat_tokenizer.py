"""What the chat template of a tokenizer says about replies. Called by `generation/` and `hf/assets.py`."""

from __future__ import annotations

from typing import Any

_PROBE = "probe-of-a-reply"


def reply_end_ids(tokenizer: Any) -> frozenset[int]:
    """The id of the special token that ends a reply under the chat template of a transformers tokenizer.

    Found by rendering a conversation of two messages: the first special token after the reply, with nothing but white space
    before it. Empty without a template, if it refuses such a conversation, or if its replies end with ordinary text.
    """
    import jinja2

    if not tokenizer.chat_template:
        return frozenset()
    messages = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (jinja2.TemplateError, TypeError, IndexError, KeyError):
        return frozenset()
    if _PROBE not in text:
        return frozenset()
    after = text[text.rindex(_PROBE) + len(_PROBE) :]
    found = [(after.index(str(token)), id_) for id_, token in _special(tokenizer).items() if str(token) in after]
    if not found:
        return frozenset()
    place, id_ = min(found)
    return frozenset() if after[:place].strip() else frozenset({id_})


def _special(tokenizer: Any) -> dict[int, str]:
    """The spelling of every special token by its id."""
    spelled = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return spelled | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
