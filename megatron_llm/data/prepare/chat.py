"""Conversations to token files: ids exactly as the tokenizer's chat template gives them, and the role of every token.

A record is `{"messages": [{"role": ..., "content": ...}, ...]}`; `"tools"` beside it is passed to the template, and a message
with `"train": false` is marked as not to be trained. Roles come from rendering: the text of messages 0..i is the start of
the text of the whole conversation, so rendering prefixes tells where each message ends, and rendering one with the
generation prompt tells where a reply starts. Tokens are mapped by the character offsets of one tokenization of the whole.
Called by `cli/preprocess_chat.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import NOT_TRAINED, ROLE_MASK, ROLES
from megatron_llm.data.prepare.inputs import Record, check_inputs
from megatron_llm.data.prepare.preprocess import Encoded, Skipped, Summary, check_unicode, run_pipeline
from megatron_llm.data.tokenizer import describe, load_pretrained

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered conversation and the role byte of the tokens in it."""

    start: int
    end: int
    role: int


def preprocess_chat(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    workers: int = 1,
    strict: bool = False,
    progress: bool = True,
) -> Summary:
    """Tokenize conversations to `output`.bin/.idx/.roles.bin/.meta.json, one document a record, in the order of the input.

    A record that cannot be used, one without an assistant's token for instance, is counted and named; with `strict` it ends
    the run. Raises ValueError for that, for unusable input files or tokenizer folders, or if no conversation is left.
    """
    check_inputs(inputs)
    meta = describe(load_chat_tokenizer(tokenizer), tokenizer, "chat")
    encoder = ChatEncoder(str(tokenizer))
    return run_pipeline(inputs, encoder, output, meta, roles=True, workers=workers, strict=strict, progress=progress)


def load_chat_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer of a folder. Raises ValueError if it cannot render conversations or trace tokens to text."""
    tokenizer = load_pretrained(folder)
    if not tokenizer.chat_template:
        raise ValueError(f"{folder} has no chat template; put a chat_template.jinja into the folder")
    if not tokenizer.is_fast:
        raise ValueError(f"{folder} has no fast tokenizer, so tokens cannot be traced to text; save it with tokenizer.json")
    tokenizer.model_max_length = 1 << 60  # only a warning depends on it; long records are training's decision
    return tokenizer


@dataclass
class ChatEncoder:
    """Documents of ids and role bytes, one a conversation."""

    tokenizer: str

    def load(self) -> None:
        self._tokenizer = load_chat_tokenizer(self.tokenizer)
        self._special = [id_ for id_, token in self._tokenizer.added_tokens_decoder.items() if token.special]

    def encode(self, records: list[Record]) -> Encoded:
        result = Encoded(bytes=sum(len(record.raw) for record in records))
        rendered = []
        for record in records:
            try:
                rendered.append((record, *self._render(record)))
            except ValueError as error:
                result.skipped.append(Skipped(record.where, str(error)))
        if not rendered:
            return result
        texts = [text for _, text, _ in rendered]
        encoding = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for (record, text, spans), ids, offsets in zip(rendered, encoding["input_ids"], encoding["offset_mapping"], strict=True):
            tokens = np.asarray(ids, np.int32)
            offsets_n2 = np.asarray(offsets, np.int64).reshape(-1, 2)
            roles = token_roles(spans, text, offsets_n2, np.isin(tokens, self._special))
            if ((roles & ROLE_MASK) == ROLES["assistant"]).any():
                result.documents.append((tokens, roles))
            else:
                result.skipped.append(Skipped(record.where, "no assistant token to learn from"))
        return result

    def _render(self, record: Record) -> tuple[str, list[Span]]:
        """Text and spans of a record. Raises ValueError saying what is wrong with it."""
        import jinja2

        content = record.json()
        messages, tools = _messages(content), content.get("tools")

        def render(part: Sequence[Message], prompt: bool) -> str:
            try:
                text: str = self._tokenizer.apply_chat_template(
                    list(part), tools=tools, tokenize=False, add_generation_prompt=prompt
                )
            except (jinja2.TemplateError, TypeError, IndexError, KeyError) as error:
                raise ValueError(f"the chat template refuses it: {error}") from error
            return text

        text = render(messages, False)
        check_unicode(text)
        return text, role_spans(render, messages, text)


def _messages(content: dict[str, Any]) -> list[Message]:
    """The checked messages of a record. Raises ValueError."""
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no list 'messages'")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("a message is not a JSON object")
        role, text = message.get("role"), message.get("content")
        if not isinstance(role, str) or role == "none" or role not in ROLES:
            raise ValueError(f"unknown role {role!r}; known: system, user, assistant, tool")
        if not isinstance(text, str) and not (text is None and message.get("tool_calls")):
            raise ValueError(f"the content of a message of role {role!r} is not a string")
    return messages


def role_spans(render: Render, messages: Sequence[Message], full: str) -> list[Span]:
    """Where each message lies in `full`, the text of all messages; `render(messages, generation_prompt)` gives text.

    What introduces a reply belongs to nobody; what introduces another message belongs to that message. Messages that cannot
    be told apart (a system message that the template puts into the first user message) form one span with the role of the
    last of them. Raises ValueError if it cannot be told where a reply starts or ends.
    """
    texts = [_try(render, messages[:count], False) for count in range(len(messages))] + [full]
    ends = [len(text) if text is not None and full.startswith(text) else None for text in texts]
    spans: list[Span] = []
    done = 0  # everything before belongs to a span or to nobody
    for index, message in enumerate(messages):
        role, end = ROLES[message["role"]], ends[index + 1]
        if role != ROLES["assistant"]:
            if end is not None and end > done:
                spans.append(Span(done, end, role))
                done = end
            continue
        start = _reply_start(_try(render, messages[:index], True), ends[index], full)
        if start is None or end is None or not done <= start <= end:
            raise ValueError(
                "the chat template changes a reply or the text before it when more messages follow, "
                f"so it cannot be told which tokens are the reply (message {index})"
            )
        before = ROLES[messages[index - 1]["role"]] if index else ROLES["none"]
        if ends[index] is None and before != ROLES["assistant"]:
            spans.append(Span(done, start, before))
        spans.append(Span(start, end, role if message.get("train", True) else role | NOT_TRAINED))
        done = end
    return spans


def _try(render: Render, messages: Sequence[Message], prompt: bool) -> str | None:
    """Text of some of the messages; None if the template refuses them, as many do without a user's message."""
    try:
        return render(messages, prompt)
    except ValueError:
        return None


def _reply_start(prompted: str | None, unprompted_end: int | None, full: str) -> int | None:
    """Where a reply starts in `full`: after the generation prompt, of which `full` may hold only a part.

    Thinking models' prompts open a `<think>` that the template leaves out of finished replies.
    """
    if prompted is None:
        return unprompted_end
    if full.startswith(prompted):
        return len(prompted)
    if unprompted_end is None:
        return None
    return max(unprompted_end, len(os.path.commonprefix([prompted, full])))


def token_roles(
    spans: Sequence[Span], text: str, offsets: npt.NDArray[np.int64], special: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Role byte of each token: uint8 [n], from `offsets` [n, 2] (first character, end) and which tokens are special [n].

    A token belongs to the span of its last character: one that joins the introduction of a reply with its first letters
    is part of the reply. White space that the template puts after the token that ends a reply belongs to nobody, because
    generation stops before it; the ending token itself is the reply's, or the model would never learn to stop.
    """
    roles = np.zeros(len(offsets), np.uint8)
    last = offsets[:, 1] - 1
    for span in spans:
        inside = np.flatnonzero((last >= span.start) & (last < span.end))
        if span.role & ROLE_MASK == ROLES["assistant"]:
            ending = inside[special[inside]]
            if len(ending) and not text[offsets[ending[-1], 1] : span.end].strip():
                inside = inside[inside <= ending[-1]]
        roles[inside] = span.role
    return roles
