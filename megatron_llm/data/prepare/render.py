"""Conversations as the chat template writes them, and where in the text each message lies. Called by `chat.py` and `show.py`.

The text is rendered once. Where its messages lie is found in a conversation of the same shape whose contents are marks that
occur nowhere else (`layout.py`): between two marks is what the template writes itself, and if the text is that with the
contents put in, the places are known. Layouts are kept, so most records cost one rendering. Where a template reads the
contents (a thought that is moved, or left out of earlier turns), each message is replaced by a mark in turn, and what changes
is where it lies. What neither way tells is refused.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_llm.data.chat_tokenizer import template_errors
from megatron_llm.data.indexed import NOT_TRAINED, ROLE_MASK, ROLES
from megatron_llm.data.prepare.layout import Layout, Message, Place, Region, common_prefix, find_layout, first_end, function_names
from megatron_llm.data.prepare.spans import ASSISTANT, Span

LAYOUTS = 128  # kept for later records of the same shape
PRIVATE_USE = range(0xE000, 0xF900)  # characters that mean nothing: marks are made of them
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class Rendered:
    """A conversation as text, the spans of its messages, and what is worth telling about it, in words."""

    text: str
    spans: list[Span]
    notes: list[str] = field(default_factory=list)


class Renderer:
    """Renders with the chat template of a transformers tokenizer."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        """`stops`: the tokens that end replies, as text; a generation block that leaves one out is extended to it."""
        self._tokenizer, self.stops = tokenizer, tuple(stops)
        self.bos: str = tokenizer.bos_token or ""
        self._layouts: OrderedDict[str, Layout | ValueError] = OrderedDict()

    def render(self, messages: Sequence[Message], tools: Any = None, role_bytes: Sequence[int] | None = None) -> Rendered:
        """Text and spans; `role_bytes` are those of the messages (None: their roles, all trained).

        Raises ValueError if the template refuses the conversation, leaves out a message, or does not let it be told which
        part of the text is a reply.
        """
        roles = [ROLES[message["role"]] for message in messages] if role_bytes is None else role_bytes
        text = self.text(messages, tools)
        layout = self._layout(messages, tools)
        notes = ["the template shows the calls of a message but not its text"] if layout.left_out else []
        if any(name not in text for name in function_names(tools)):
            notes.append("the template does not show the tools")
        if any(_quoted(arguments) in text for arguments in _argument_strings(messages)):
            notes.append("the template quotes the arguments of a tool call, which are JSON in a string; give them as an object")
        regions = match(layout, messages, text)
        if regions is not None:
            spans = _spans(layout, roles, regions, text, self.stops)
            if layout.blocks is not None:
                spans = _with_blocks(spans, roles, _placed(layout, layout.blocks, regions, text), text, self.stops)
            return Rendered(text, spans, notes)
        regions = self._by_substitution(layout, messages, tools, text)
        spans = _spans(layout, roles, regions, text, self.stops, strict=True)
        if any(_shortened(message, text[slice(*_shown(number, regions, spans))]) for number, message in enumerate(messages)):
            notes.append("the template leaves out a part of a message, as some do with earlier thoughts")
        if layout.blocks is not None:
            spans = _with_blocks(spans, roles, _owners(self.blocks(messages, tools, text), spans), text, self.stops)
        return Rendered(text, spans, notes)

    def text(self, messages: Sequence[Message], tools: Any = None, prompt: bool = False) -> str:
        """What the template makes of the messages. Raises ValueError if it refuses them."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except template_errors() as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return text

    def marked(self, tools: Any) -> bool:
        """Whether the template says with `{% generation %}` what the assistant's words are."""
        return bool(_MARKERS.search(self._tokenizer.get_chat_template(tools=tools)))

    def blocks(self, messages: Sequence[Message], tools: Any, text: str) -> list[tuple[int, int]]:
        """Characters of the generation blocks of `text`, which is what the template makes of the messages."""
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        rendered: Any = render_jinja_template(  # annotated as one text, but it gives lists of texts and of blocks
            conversations=[plain],
            tools=tools,
            chat_template=self._tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **self._tokenizer.special_tokens_map,
        )
        texts, ranges = rendered
        if texts[0] != text:
            raise ValueError("the chat template does not give the same text twice")
        return [(start, end) for start, end in ranges[0] if end > start]

    def _layout(self, messages: Sequence[Message], tools: Any) -> Layout:
        """The layout of this shape of conversation. Raises ValueError if it cannot be told."""
        shape = _shape(messages)
        key = json.dumps([shape, tools], ensure_ascii=False, default=str)
        if key not in self._layouts:
            try:
                self._layouts[key] = find_layout(self, shape, tools)
            except ValueError as error:
                self._layouts[key] = error
            if len(self._layouts) > LAYOUTS:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(key)
        found = self._layouts[key]
        if isinstance(found, ValueError):
            raise ValueError(str(found))
        return found

    def _by_substitution(self, layout: Layout, messages: Sequence[Message], tools: Any, text: str) -> dict[int, Region]:
        """Where each content that the layout shows lies in `text`: what changes when a mark takes its place."""
        mark = next((chr(code) for code in PRIVATE_USE if chr(code) not in text), None)
        if mark is None:
            raise ValueError("the text holds every private-use character")
        regions: dict[int, Region] = {}
        for index in layout.order:
            changed = self.text([*messages[:index], {**messages[index], "content": mark}, *messages[index + 1 :]], tools)
            start = common_prefix(text, changed)
            same = common_prefix(text[start:][::-1], changed[start:][::-1])
            if changed.count(mark) != 1 or not start <= changed.index(mark) < len(changed) - same:
                raise ValueError(f"it cannot be told where the content of message {index} lies")
            regions[index] = (start, len(text) - same)
        places = [regions[index] for index in layout.order]
        if any(one[1] > other[0] for one, other in zip(places, places[1:], strict=False)):
            raise ValueError("the chat template mixes the messages, so it cannot be told which tokens are the reply")
        return regions


def match(layout: Layout, messages: Sequence[Message], text: str) -> dict[int, Region] | None:
    """Where each content lies in `text` if that is the layout with the contents, bare or stripped, put in; else None."""
    at = len(layout.literals[0])
    if not text.startswith(layout.literals[0]):
        return None
    regions: dict[int, Region] = {}
    for index, literal in zip(layout.order, layout.literals[1:], strict=True):
        for shown in _strippings(messages[index]["content"]):
            end = at + len(shown)
            if text.startswith(shown, at) and text.startswith(literal, end):
                break
        else:
            return None
        regions[index] = (at, end)
        at = end + len(literal)
    return regions if at == len(text) else None


def _strippings(content: str) -> list[str]:
    """The content, and what templates make of one with white space around it."""
    if content == content.strip():
        return [content]
    ways = (None, "\n")
    return [content, *(strip(content, way) for strip in (str.rstrip, str.lstrip, str.strip) for way in ways)]


def _argument_strings(messages: Sequence[Message]) -> Iterator[str]:
    """The arguments of tool calls that are a string, as OpenAI's interface gives them."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
                yield arguments


def _quoted(text: str) -> str:
    """As the filter `tojson` writes a string."""
    return json.dumps(text, ensure_ascii=False)


def _shape(messages: Sequence[Message]) -> list[Message]:
    """The messages with True for their contents: all that a layout depends on.

    A blank content counts as itself where templates write another text for it: a system message, and text beside tool calls.
    """
    return [
        {**message, "content": True}
        if isinstance(content := message.get("content"), str)
        and (content.strip() or not (message["role"] == "system" or message.get("tool_calls")))
        else message
        for message in messages
    ]


def _spans(
    layout: Layout,
    roles: Sequence[int],
    regions: Mapping[int, Region],
    text: str,
    stops: Sequence[str],
    strict: bool = False,
) -> list[Span]:
    """Spans of all messages in `text`, whose contents lie in `regions`.

    What introduces a reply belongs to nobody, nor does what follows the first of the `stops` behind it, and white space after
    that; what introduces another message belongs to that message. Of a message that the template writes into the next one (a
    system message in the first user's) only its content and what precedes it is its own. What the template says before a user
    who speaks first, a default system message or the tools, is the system's. Raises ValueError for replies that
    overlap, and with `strict` if the text around replies is not the layout's.
    """
    spans: list[Span] = []
    done = 0  # everything before belongs to a span or to nobody
    if layout.opening and text.startswith(layout.text[: layout.opening]):
        done = layout.opening
        spans.append(Span(0, done, ROLES["system"], layout.messages[0]))
    for index in layout.messages:
        end, shown = layout.ends.get(index), regions.get(index, (done, done))
        if roles[index] & ROLE_MASK != ASSISTANT:
            stop = shown[1] if end is None else max(shown[1], layout.locate(end, regions, text))
            if spans and spans[-1].role & ROLE_MASK == ASSISTANT:
                done += len(text[done:stop]) - len(text[done:stop].lstrip())
            if stop > done:
                spans.append(Span(done, stop, roles[index], index))
                done = stop
            continue
        assert end is not None
        start = _reply_start(layout, index, regions, text, strict)
        stop = layout.locate(end, regions, text, strict)
        if not done <= start <= stop or (index in regions and not start <= shown[1] <= stop):
            raise ValueError(f"it cannot be told which tokens are the reply (message {index})")
        if spans and spans[-1].message not in layout.ends and spans[-1].end == done:
            spans[-1] = replace(spans[-1], end=start)
        ended = first_end(text, max(start, shown[1]), stop, stops)
        spans.append(Span(start, stop if ended is None else ended, roles[index], index))
        done = stop
    return spans


def _reply_start(layout: Layout, index: int, regions: Mapping[int, Region], text: str, strict: bool) -> int:
    """Where a reply starts; behind the thought that the prompt opens if the reply opens it too."""
    place = layout.starts[index]
    anchor = layout.locate(Place(place.anchor, 0), regions, text)
    prompt = layout.prompts.get(index)
    if prompt is not None and text.startswith(prompt, anchor):
        return anchor + len(prompt)
    return layout.locate(place, regions, text, strict)


def _shown(index: int, regions: Mapping[int, Region], spans: Sequence[Span]) -> Region:
    """The text that shows a message: its reply, or its content."""
    reply = next((span for span in spans if span.message == index and span.role & ROLE_MASK == ASSISTANT), None)
    return regions.get(index, (0, 0)) if reply is None else (reply.start, reply.end)


def _shortened(message: Message, shown: str) -> bool:
    """Whether `shown` has fewer visible characters than the content."""
    content = message.get("content")
    return isinstance(content, str) and len("".join(shown.split())) < len("".join(content.split()))


def _placed(
    layout: Layout, blocks: Mapping[int, list[tuple[Place, Place]]], regions: Mapping[int, Region], text: str
) -> dict[int, list[Region]]:
    return {
        index: [(layout.locate(start, regions, text), layout.locate(end, regions, text)) for start, end in parts]
        for index, parts in blocks.items()
    }


def _owners(blocks: Sequence[Region], spans: Sequence[Span]) -> dict[int, list[Region]]:
    """Generation blocks by the message of the reply that they lie in. Raises ValueError for one that lies in none or in two."""
    found: dict[int, list[Region]] = {}
    for start, end in blocks:
        owners = [span.message for span in spans if span.role & ROLE_MASK == ASSISTANT and start < span.end and span.start < end]
        if len(owners) != 1:
            raise ValueError("a generation block of the chat template is not in one reply")
        found.setdefault(owners[0], []).append((start, end))
    return found


def _with_blocks(
    spans: Sequence[Span], roles: Sequence[int], blocks: Mapping[int, list[Region]], text: str, stops: Sequence[str]
) -> list[Span]:
    """Of each reply its generation blocks alone are trained, up to and with the token that ends it."""
    found: list[Span] = []
    for span in spans:
        if span.role & ROLE_MASK != ASSISTANT:
            found.append(span)
            continue
        found.append(replace(span, role=span.role | NOT_TRAINED))
        parts = list(blocks.get(span.message, ()))
        if parts:
            start, end = parts[-1]
            rest = text[end : max(end, span.end)]
            blank = len(rest) - len(rest.lstrip())
            stop = next((stop for stop in stops if rest.startswith(stop, blank)), None)
            parts[-1] = (start, end if stop is None else end + blank + len(stop))
        found += [Span(start, end, roles[span.message], span.message) for start, end in parts]
    return found
