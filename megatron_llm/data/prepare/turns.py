"""From the turns of a conversation, however a data set spells them, to messages.

`conversations.py` gets here for lists of turns (`from`/`value`), for transcripts in one string (`### Human: ...`), and for
what all of them need: names of speakers, and an order that chat templates take.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Message = dict[str, Any]

SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "person"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "gpt4", "gpt-4", "gpt-3.5", "bing", "bard", "claude", "model", "bot", "chatbot", "ai"),
        "assistant",
    ),
    **dict.fromkeys(("function_call", "function-call"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "observation", "function_response", "function-response", "tool_response", "ipython"), "tool"
    ),
}
LEADING = "replies before the first question are left out"
JOINED = "turns of one speaker in a row are joined by a blank line"


@dataclass(frozen=True)
class Markers:
    """How a transcript marks its speakers: `pattern` has the speaker as group 1; `user` and `assistant` as it spells them."""

    pattern: re.Pattern[str]
    user: str = "human"
    assistant: str = "assistant"

    def mark(self, text: object) -> bool:
        """Whether this is such a transcript: a string that begins with a marker, or has markers of both speakers."""
        if not isinstance(text, str):
            return False
        found = {match[1].lower() for match in self.pattern.finditer(text)}
        return {self.user, self.assistant} <= found or (bool(found) and self.pattern.match(text.lstrip()) is not None)

    def turns(self, text: str, open_end: bool = False) -> list[Message]:
        """Messages of a transcript, without white space at their ends; what stands before the first is a system message.

        `open_end`: the last marker may have nothing behind it. Raises ValueError for a turn without text.
        """
        lead, *rest = self.pattern.split(text)
        messages = [{"role": "system", "content": lead.strip()}] if lead.strip() else []
        for speaker, said in zip(rest[::2], rest[1::2], strict=True):
            messages.append({"role": SPEAKERS[speaker.lower()], "content": said.strip()})
        if open_end and messages and not messages[-1]["content"]:
            messages.pop()
        for number, message in enumerate(messages, 1):
            if not message["content"]:
                raise ValueError(f"turn {number} ({message['role']}) has no text")
        return messages


GUANACO = Markers(re.compile(r"###[ \t]*(Human|Assistant|System):"))
OIG = Markers(re.compile(r"<(human|bot)>:"), assistant="bot")
HH = Markers(re.compile(r"(?:\A|\n\n)(Human|Assistant):"))
BELLE = Markers(re.compile(r"(?:\A|\n)(Human|Assistant)[:：]"))


def settle(messages: Sequence[Message]) -> tuple[list[Message], tuple[str, ...]]:
    """Messages as templates take them, and what was changed in words: no reply before the first question, speakers alternate.

    A transcript that was cut begins with a reply whose question is not there: it is left out. Neighbours of one speaker are
    joined if they differ in their text alone. Raises ValueError if there is no question.
    """
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError("no turn of a user")
    kept = [message for message in messages[:first] if message["role"] == "system"] + list(messages[first:])
    changed = [LEADING] if len(kept) < len(messages) else []
    settled: list[Message] = []
    for message in kept:
        if settled and _same_but_text(settled[-1], message):
            settled[-1] = {**message, "content": f"{settled[-1]['content']}\n\n{message['content']}"}
            if JOINED not in changed:
                changed.append(JOINED)
        else:
            settled.append(message)
    return settled, tuple(changed)


def _same_but_text(one: Message, other: Message) -> bool:
    texts = isinstance(one["content"], str) and isinstance(other["content"], str)
    return texts and one["role"] != "tool" and "tool_calls" not in one and {**one, "content": ""} == {**other, "content": ""}


def turn_messages(turns: Sequence[Any]) -> list[Message]:
    """Messages from turns with `from`/`value` or `role`/`content`; other fields of a turn are kept, those that are null are not.

    Raises ValueError naming the turn that has no text or no known speaker.
    """
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} is not a JSON object")
        speaker = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content", turn.get("text")))
        role = SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(f"unknown speaker {speaker!r}; known: {', '.join(SPEAKERS)}")
        calls = turn.get("tool_calls")
        if not isinstance(text, str) and not (text is None and calls):
            raise ValueError(f"turn {number} ({speaker}) has no text")
        if role == "system" and not text:
            continue
        if role in ("user", "assistant") and not calls and not (text or "").strip():
            raise ValueError(f"turn {number} ({speaker}) has no text")
        spelled = ("from", "value", "role", "content", "text")
        rest = {key: value for key, value in turn.items() if key not in spelled and value is not None}
        messages.append({"role": role, "content": text, **rest})
    return messages
