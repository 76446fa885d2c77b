"""`preprocess-chat --map`: which columns of a record are said by whom, for data sets of no known format.

In words, `question=user answer=assistant`, or in a YAML file, there also with a template for each role. `records.py` reads
records through it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_llm.config.load import read_raw_config
from megatron_llm.data.prepare.turns import SPEAKERS, Message, Record

_PIECE = re.compile(r"(\{\{|\}\}|\{[^{}]+\}|[{}])")


@dataclass(frozen=True)
class Column:
    """A field of the record; `optional`: it may be missing, null or blank."""

    name: str
    optional: bool = False


@dataclass(frozen=True)
class Said:
    """A message: `paragraphs`, each literal text and columns back to back; those without text are left out."""

    role: str
    paragraphs: tuple[tuple[str | Column, ...], ...]

    @property
    def columns(self) -> list[Column]:
        return [piece for paragraph in self.paragraphs for piece in paragraph if isinstance(piece, Column)]


@dataclass(frozen=True)
class Mapping:
    """The messages that a record gives, in order."""

    said: tuple[Said, ...]

    def messages(self, record: Record) -> list[Message]:
        """Raises ValueError naming a column that the record lacks, that is no text, or that leaves its message empty."""
        messages = []
        for said in self.said:
            text = "\n\n".join(filter(None, (_paragraph(pieces, record) for pieces in said.paragraphs)))
            if text:
                messages.append({"role": said.role, "content": text})
            elif said.role != "system" and (needed := [column for column in said.columns if not column.optional]):
                raise ValueError(f"column {needed[0].name!r} is empty")
        return messages


def _paragraph(pieces: Sequence[str | Column], record: Record) -> str:
    texts = [piece if isinstance(piece, str) else _value(piece, record) for piece in pieces]
    text = "".join(texts)
    return text if all(texts) else text.strip()  # without what stood between two columns, one of which is empty


def _value(column: Column, record: Record) -> str:
    value = record.get(column.name)
    if value is None:
        if column.optional:
            return ""
        raise ValueError(f"no column {column.name!r} (its fields: {', '.join(record)}); if it may be missing, map it with a '?'")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"column {column.name!r} is not a text but {type(value).__name__}")
    return str(value) if str(value).strip() else ""


def read_mapping(words: Sequence[str]) -> Mapping:
    """`COLUMN=ROLE` for each column, with a `?` behind if it may be missing; or the name of one YAML file.

    The file holds the same as `COLUMN: ROLE`, or `ROLE: TEMPLATE` with `{column}` (or `{column?}`) in the templates; a brace
    is written twice. Columns of one role in a row are paragraphs of one message. Raises ValueError for everything else.
    """
    if len(words) == 1 and "=" not in words[0]:
        return _from_file(Path(words[0]))
    pairs = []
    for word in words:
        column, equals, role = word.rpartition("=")
        if not equals or not column:
            raise ValueError(f"--map {word}: give COLUMN=ROLE for each column, or one YAML file")
        pairs.append((column, role))
    return _from_columns(pairs)


def _from_file(path: Path) -> Mapping:
    if not path.is_file():
        raise ValueError(f"--map {path}: no such file; give COLUMN=ROLE for each column, or a YAML file with such lines")
    content = read_raw_config(path)
    entries = [(str(key), value) for key, value in content.items()]
    if not all(isinstance(value, str) for _, value in entries):
        raise ValueError(f"--map {path}: a value is not a string; give 'COLUMN: ROLE' or 'ROLE: TEMPLATE' in every line")
    if not any("{" in value for _, value in entries):
        return _from_columns(entries)
    return _checked([Said(_role(role), (_template(value, path),)) for role, value in entries])


def _from_columns(pairs: Sequence[tuple[str, str]]) -> Mapping:
    columns = [
        (_role(role.removesuffix("?")), Column(name.removesuffix("?"), role.endswith("?") or name.endswith("?")))
        for name, role in pairs
    ]
    blocks = groupby(columns, key=lambda pair: pair[0])
    return _checked([Said(role, tuple((column,) for _, column in block)) for role, block in blocks])


def _role(name: str) -> str:
    role = SPEAKERS.get(name.lower())
    if role is None:
        raise ValueError(f"--map: unknown role {name!r}; known: system, user, assistant, tool")
    return role


def _template(text: str, path: Path) -> tuple[str | Column, ...]:
    pieces: list[str | Column] = []
    for piece in filter(None, _PIECE.split(text)):
        if piece in ("{", "}"):
            raise ValueError(f"--map {path}: a brace without its other half in {text!r}; a brace that is text is written twice")
        if piece in ("{{", "}}"):
            pieces.append(piece[0])
        elif piece.startswith("{"):
            name = piece[1:-1].strip()
            pieces.append(Column(name.removesuffix("?"), name.endswith("?")))
        else:
            pieces.append(piece)
    return tuple(pieces)


def _checked(said: list[Said]) -> Mapping:
    if not any(one.role == "assistant" and one.columns for one in said):
        raise ValueError("--map gives no column to the assistant, so there would be nothing to learn")
    return Mapping(tuple(said))


def describe_mapping(mapping: Mapping | None) -> Any:
    """What tells one mapping from another. Can be stored as JSON."""
    return None if mapping is None else repr(mapping)
