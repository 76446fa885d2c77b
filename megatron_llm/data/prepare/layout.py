"""What a chat template writes around the contents of a conversation, found by rendering marks instead of them.

Called by `render.py`. In a conversation whose contents are marks, the template's own text is all that lies between two marks.
Where a message ends is found by rendering the conversation up to it, and where a reply starts by rendering what comes before
it with the generation prompt: after the last mark of these, as far as they agree with the whole. Only text after the last mark is
compared, so templates that treat earlier turns differently once others follow are no trouble, nor are those that move a
system message into a later turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

Message = dict[str, Any]
Region = tuple[int, int]

MARK = "\ue000{}\ue001"  # of two private-use characters, so no mark is part of another, and templates do not strip it
PROBE = MARK.format("r")


class Place(NamedTuple):
    """A place in a rendered conversation: characters after the content of message `anchor`, -1 for the start of the text."""

    anchor: int
    offset: int


class Template(Protocol):
    """A chat template: what it makes of messages (ValueError: it refuses them), and which of that its markers mark.

    `stops`: the texts of the tokens with which it ends replies; `bos`: that of the bos token, "" if there is none.
    """

    @property
    def stops(self) -> Sequence[str]: ...

    @property
    def bos(self) -> str: ...

    def text(self, messages: Sequence[Message], tools: Any = None, prompt: bool = False) -> str: ...

    def marked(self, tools: Any) -> bool: ...

    def blocks(self, messages: Sequence[Message], tools: Any, text: str) -> list[Region]: ...


@dataclass
class Layout:
    """Conversations of one shape, as a template writes them.

    Attributes:
        text: the conversation with marks; regions: where the mark of each message with a shown content lies in it.
        order: those messages by place; literals: the text before, between and after their contents.
        messages: all messages by place. starts, ends: of replies, where the model's words begin, and of all messages where they
            end, missing if that cannot be told. prompts: of replies, all that the generation prompt adds after the content
            before it, which may be more than what a finished reply shows (an opened thought).
        blocks: generation blocks of each reply, None if the template has no markers.
        left_out: messages whose text gives way to their tool calls.
        opening: characters at the start that the template says as a system although no message does: a default, the tools.
    """

    text: str
    regions: dict[int, Region]
    order: list[int] = field(default_factory=list)
    literals: list[str] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    starts: dict[int, Place] = field(default_factory=dict)
    ends: dict[int, Place] = field(default_factory=dict)
    prompts: dict[int, str] = field(default_factory=dict)
    blocks: dict[int, list[tuple[Place, Place]]] | None = None
    left_out: list[int] = field(default_factory=list)
    opening: int = 0

    def __post_init__(self) -> None:
        self.order = sorted(self.regions, key=self.regions.__getitem__)
        edges = [0, *(edge for index in self.order for edge in self.regions[index]), len(self.text)]
        self.literals = [self.text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]

    def place_of(self, at: int) -> Place:
        """A character of `text` as a place. Raises ValueError inside a mark."""
        anchor, end = -1, 0
        for index in self.order:
            if self.regions[index][1] > at:
                if self.regions[index][0] < at:
                    raise ValueError(f"the chat template's replies cannot be told from the content of message {index}")
                break
            anchor, end = index, self.regions[index][1]
        return Place(anchor, at - end)

    def locate(self, place: Place, regions: Mapping[int, Region], text: str, strict: bool = False) -> int:
        """The character of a place in `text`, whose contents lie in `regions`.

        Raises ValueError with `strict` if what lies between the content and the place is not what the layout says.
        """
        start, mine = (0, 0) if place.anchor < 0 else (regions[place.anchor][1], self.regions[place.anchor][1])
        if strict and not text.startswith(self.text[mine : mine + place.offset], start):
            raise ValueError("the chat template writes other text around a reply with these contents, so it cannot be told apart")
        return start + place.offset


def find_layout(template: Template, shape: Sequence[Message], tools: Any) -> Layout:
    """The layout of conversations with the messages of `shape`, where True stands for a content.

    Raises ValueError if the template refuses them, leaves a content out or shows it twice, or if it cannot be told where a
    reply starts or ends.
    """
    messages = [
        {**message, "content": MARK.format(index)} if message.get("content") is True else message
        for index, message in enumerate(shape)
    ]
    text = template.text(messages, tools)
    layout = Layout(text, _regions(messages, text))
    layout.left_out = [i for i, message in enumerate(shape) if message.get("content") is True and i not in layout.regions]
    for index, message in enumerate(shape):
        if index in layout.left_out and not message.get("tool_calls"):
            raise ValueError(f"the chat template leaves out message {index} ({message['role']})")
        if any(name not in text for name in function_names(message.get("tool_calls"))):
            raise ValueError(f"the chat template leaves out the tool calls of message {index}")
    blocks = template.blocks(messages, tools, text) if template.marked(tools) else None
    places: list[tuple[int, int]] = []  # of each message, to sort them by
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    for index, message in enumerate(messages):
        start = end = None
        if message["role"] == "assistant":
            start = _reply_start(template, messages, index, tools, layout, ends)
            if start is None and index in layout.regions:
                at = layout.regions[index][0]
                start = next((first for first, last in blocks or () if first <= at < last), None)
            if start is not None:
                end = _reply_end(template, messages[: index + 1], tools, layout, start)
            if start is None or end is None or end < start:
                raise ValueError(f"it cannot be told where the reply of message {index} starts and ends")
            starts[index] = start
        else:
            end = len(text) if index == len(messages) - 1 else _end(template, messages[: index + 1], tools, layout)
        if end is not None:
            ends[index] = end
        known = layout.regions[index][0] if index in layout.regions else start if start is not None else end
        places.append((places[-1][0] if known is None and places else known or 0, index))
    layout.messages = [index for _, index in sorted(places)]
    layout.starts = {index: layout.place_of(start) for index, start in starts.items()}
    layout.ends = {index: layout.place_of(end) for index, end in ends.items()}
    if blocks is not None:
        layout.blocks = _by_reply(blocks, layout, starts, ends)
    if messages[0]["role"] == "user" and layout.messages[0] == 0:
        layout.opening = _opening(template, tools, layout.literals[0])
    return layout


def _opening(template: Template, tools: Any, before: str) -> int:
    """How much of what stands `before` a user who speaks first does not introduce him: what stands before later ones does."""
    later = [{"role": "user", "content": MARK.format(0)}, _reply(MARK.format(1)), {"role": "user", "content": MARK.format(2)}]
    try:
        between = template.text(later, tools).partition(MARK.format(1))[2].partition(MARK.format(2))[0]
    except ValueError:
        return 0
    introduction = between[first_end(between, 0, len(between), template.stops) or 0 :].lstrip()
    at = before.rfind(introduction) if introduction else -1
    return at if at > 0 and before[:at].strip() not in ("", template.bos) else 0


def function_names(calls: Any) -> list[str]:
    """The names of the functions of tools or tool calls, as far as they have the usual form."""
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [str(function["name"]) for function in functions if isinstance(function, dict) and "name" in function]


def common_prefix(one: str, other: str) -> int:
    """Number of characters that two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # by halves, comparing slices: a loop over characters is slow in long texts
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def first_end(text: str, start: int, end: int, parts: Sequence[str]) -> int | None:
    """Where the first of some texts that lies in text[start:end] ends."""
    found = [(at, at + len(part)) for part in parts if (at := text.find(part, start, end)) >= 0]
    return min(found)[1] if found else None


def _regions(messages: Sequence[Message], text: str) -> dict[int, Region]:
    """Where the marks lie. Raises ValueError for one that is shown twice."""
    regions: dict[int, Region] = {}
    for index, message in enumerate(messages):
        mark = MARK.format(index)
        if message.get("content") != mark or (at := text.find(mark)) < 0:
            continue
        if text.find(mark, at + 1) >= 0:
            raise ValueError(f"the chat template shows the content of message {index} ({message['role']}) more than once")
        regions[index] = (at, at + len(mark))
    return regions


def _after_marks(part: str, layout: Layout) -> tuple[int, str] | None:
    """The text after the last mark of `part`, and where in the layout's text that mark ends.

    (0, `part`) if there is none; None if it is one that the layout does not show.
    """
    close = part.rfind("\ue001")
    if close < 0:
        return 0, part
    index = int(part[part.rfind("\ue000", 0, close) + 1 : close])
    return (layout.regions[index][1], part[close + 1 :]) if index in layout.regions else None


def _reply_end(template: Template, part: Sequence[Message], tools: Any, layout: Layout, start: int) -> int | None:
    """Where the reply that ends `part` ends in the layout's text: behind the token that ends it.

    Where the template writes no such token, where it ends with nothing after it.
    """
    begin = max(start, layout.regions.get(len(part) - 1, (start, start))[1])
    limit = next((layout.regions[index][0] for index in layout.order if layout.regions[index][0] >= begin), len(layout.text))
    stop = first_end(layout.text, begin, limit, template.stops)
    return _end(template, part, tools, layout) if stop is None else stop


def _end(template: Template, part: Sequence[Message], tools: Any, layout: Layout) -> int | None:
    """Where the last message of `part` ends in the layout's text, None if the template does not let it be the last."""
    try:
        found = _after_marks(template.text(part, tools), layout)
    except ValueError:
        return None
    if found is None:
        return None
    anchor, tail = found
    return anchor + common_prefix(tail, layout.text[anchor:])


def _reply_start(
    template: Template, messages: Sequence[Message], index: int, tools: Any, layout: Layout, ends: Mapping[int, int]
) -> int | None:
    """Where the reply `index` starts in the layout's text: after the generation prompt, or the part of it that is shown.

    The prompts of models that think open a `<think>` that the template leaves out of finished replies.
    """
    if index == 0:
        return _opening_start(template, tools, layout)
    try:
        found = _after_marks(template.text(messages[:index], tools, prompt=True), layout)
    except ValueError:
        found = None
    if found is None:
        return None
    anchor, prompt = found
    shown = layout.text[anchor:]
    if index not in layout.regions:  # what it writes here may begin like the prompt by accident: compare with a plain reply
        try:
            plain = _after_marks(template.text([*messages[:index], _reply(PROBE)], tools).partition(PROBE)[0], layout)
        except ValueError:
            plain = None
        if plain is not None and plain[0] == anchor:
            shown = plain[1]
    before = ends.get(index - 1)
    shared = prompt[: common_prefix(prompt, shown)]
    start = anchor + (len(shared) if layout.text.startswith(shared, anchor) else 0)
    if prompt != shared:
        header = _added_by_prompt(template, messages[:index], tools)
        limit = layout.regions[index][0] if index in layout.regions else len(layout.text)
        if header and (at := layout.text.find(header, max(start, before or 0), limit)) >= 0:
            return at + len(header)  # what lies before it differs, as a line's end that only the last message lacks
        if len(shared) <= len(prompt) - len(header):
            return None  # not even what precedes the prompt is the same
        if layout.place_of(start).anchor == layout.place_of(anchor).anchor:
            layout.prompts[index] = prompt
    return start if before is None else max(start, before)


def _added_by_prompt(template: Template, messages: Sequence[Message], tools: Any) -> str:
    """What the generation prompt adds to a conversation; empty if the template refuses it."""
    try:
        without, prompted = template.text(messages, tools), template.text(messages, tools, prompt=True)
    except ValueError:
        return ""
    return prompted[common_prefix(without, prompted) :]


def _opening_start(template: Template, tools: Any, layout: Layout) -> int | None:
    """Where the reply starts that opens the conversation: after what a prompt adds to a user's message."""
    user = [{"role": "user", "content": PROBE}]
    end = layout.regions[0][0] if 0 in layout.regions else len(layout.text)
    prompt = _added_by_prompt(template, user, tools)
    if prompt and (at := layout.text.rfind(prompt, 0, end)) >= 0:
        return at + len(prompt)
    shown = (layout.text.endswith(prompt[:length], 0, end) for length in range(len(prompt) // 2, len(prompt)))
    return end if prompt and any(shown) else None  # the rest opens a thought that finished replies do not have


def _reply(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _by_reply(
    blocks: Sequence[Region], layout: Layout, starts: Mapping[int, int], ends: Mapping[int, int]
) -> dict[int, list[tuple[Place, Place]]]:
    """The generation blocks of each reply. Raises ValueError for one that holds anything else, as markers in a macro do."""
    found: dict[int, list[tuple[Place, Place]]] = {}
    for start, end in blocks:
        owners = [index for index, (first, last) in layout.regions.items() if start < last and first < end]
        owners = owners or [index for index, first in starts.items() if start < ends[index] and first < end]
        cut = any(first < edge < last for first, last in layout.regions.values() for edge in (start, end))
        if cut or len(owners) != 1 or owners[0] not in starts:
            raise ValueError(
                "the generation markers of the chat template do not enclose one reply each; "
                "transformers places them wrongly inside of macros and captured blocks"
            )
        found.setdefault(owners[0], []).append((layout.place_of(start), layout.place_of(end)))
    return found
