"""What a record of chat data becomes, and reading the fields of a record with errors that name them.

`conversions.py` makes documents, `conversations.py` has the table of formats, `chat.py` renders and tokenizes documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_llm.data.prepare.turns import Message, Record

TURN_FIELDS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Conversation:
    """A record to render: `content` has "messages" and may have "tools" and whatever else the template is to see.

    `parts`: instruction, input and output, where the record tells instruction from input. `changed`: what was done to the
    record's messages, in words.
    """

    content: Record
    parts: tuple[str, str, str] | None = None
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segments:
    """Text without a template: (text, whether it is trained), back to back. `eos`: the tokenizer's eos token follows."""

    segments: Sequence[tuple[str, bool]]
    eos: bool = False


@dataclass(frozen=True)
class Tokens:
    """Ids that were made elsewhere, and whether each is trained."""

    ids: Sequence[int]
    trained: Sequence[bool]


Document = Conversation | Segments | Tokens
Found = Sequence[Document | ValueError]
"""What a record gives, in order; an error in the place of a document that cannot be used."""


class Made(NamedTuple):
    """A document in tokens: ids [n], role bytes [n], and what is worth telling about it, in words."""

    ids: npt.NDArray[np.int32]
    roles: npt.NDArray[np.uint8]
    notes: Sequence[str] = ()


def describe_fields(record: Record) -> str:
    names = [name if value is not None else f"{name} (null)" for name, value in record.items()]
    return f"its fields: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else "it has no fields"


def text_of(record: Record, name: str) -> str:
    """A field that must have text. Raises ValueError."""
    if record.get(name) is None:
        raise ValueError(f"no field {name!r} ({describe_fields(record)})")
    text = optional_text(record, name)
    if not text:
        raise ValueError(f"{name!r} is empty")
    return text


def optional_text(record: Record, name: str) -> str:
    """A field that may be missing, null or blank, which all give "". Raises ValueError if it is not a string."""
    text = record.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{name!r} is not a string but {type(text).__name__}")
    return text if text.strip() else ""


def list_of(record: Record, name: str) -> list[Any]:
    items = record.get(name)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{name!r} is no list, or an empty one ({describe_fields(record)})")
    return items


def turn_field(record: Record) -> str:
    """The field with the list of turns, the last of the known ones if there is none."""
    return next((name for name in TURN_FIELDS if record.get(name) is not None), TURN_FIELDS[-1])


def said(role: str, text: str) -> list[Message]:
    return [{"role": role, "content": text}] if text else []


def has(record: Record, kind: type, *names: str) -> bool:
    return all(isinstance(record.get(name), kind) for name in names)
