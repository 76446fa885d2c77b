"""What passes from reading to encoding: input files, chunks of their records, and the text or JSON object of a record.

`inputs.py` reads files with the readers of `formats.py` and `tables.py`. `preprocess.py`, `chat.py` and `dedup_steps.py`
take documents out of the chunks, often in other processes, so everything here can be pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, cast

import orjson

CHUNK_BYTES = 4 << 20
MAX_RECORD_BYTES = 128 << 20

Position = tuple[int, int, int]
"""Where reading goes on: (index into the list of files, byte offset after decompression or number of the row, records before
it in the file or -1 if not known). Can be stored as JSON."""

Kind = Literal["json", "text", "row"]
Unit = Literal["line", "record", "row", "file", "tree"]
_JSON_BLANK = b" \t\r\n"


@dataclass(frozen=True)
class InputFile:
    """An input that was found, and the part of it to read: what begins in bytes [start, end) of its `size` bytes on disk.

    `format`: lines, array or values (JSON: an object a line, one array, values one after the other), csv, tsv, text, parquet,
    arrow, hub, or trees (of the rows in all of `parts`). `version` changes when the content may have. `rows` is set for
    `hub` only.
    """

    path: str
    format: str
    compression: str
    size: int
    version: str
    start: int
    end: int
    rows: int = 0
    parts: tuple[InputFile, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A record that gives no document. `bad`: something is wrong with it, so `--strict` refuses it."""

    where: str
    reason: str
    bad: bool = True


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file, about `CHUNK_BYTES` together; more only if a single one is larger.

    `records` of kind "json" are undecoded JSON values, of kind "text" one whole document, of kind "row" dicts. Blank ones (white
    space, an empty dict) are no records, they only count in the numbering. `first` is the number of the first record, from 1,
    or 0 if it is not known (a line of a file that is read from its middle); `start` is then its byte offset. `skipped` is what
    the reader had to refuse. `input_bytes` counts after decompression, `disk_bytes` what was read from disk for it.
    """

    path: str
    kind: Kind
    unit: Unit
    records: Sequence[bytes] | Sequence[dict[str, Any]]
    first: int
    start: int
    input_bytes: int
    disk_bytes: int
    end: Position
    skipped: Sequence[Skipped] = ()

    def where(self, index: int) -> str:
        """The record in words: file and line, row, byte, or tree."""
        if self.unit == "file":
            return self.path
        if self.unit == "tree":
            return f"{self.path} tree {cast(dict[str, Any], self.records[index])['message_tree_id']}"
        if self.unit == "line":
            if self.first:
                return f"{self.path}:{self.first + index}"
            return f"{self.path} at byte {self._starts[index]}"
        return f"{self.path} {self.unit} {self.first + index}"

    @cached_property
    def _starts(self) -> list[int]:
        """The first byte of each line. Kept, because all of a million lines may have to be named."""
        return list(accumulate((len(record) + 1 for record in self.records), initial=self.start))


@dataclass(frozen=True)
class Job:
    """One file of the list to read, from where on, and the limits to keep."""

    file: InputFile
    number: int
    at: tuple[int, int] | None  # the end of an earlier chunk, as in Position; None: begin where the file's part starts
    columns: Sequence[str] | None
    chunk_bytes: int
    max_record_bytes: int

    @property
    def too_large(self) -> str:
        return f"larger than {self.max_record_bytes:,} bytes, the most a record may have"

    def check_columns(self, names: Sequence[str]) -> None:
        """Raises ValueError if a table with columns `names` lacks one that is asked for."""
        twice = [name for name in self.columns or names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{self.file.path} has several columns {twice[0]!r}; rename all but one")
        missing = [name for name in self.columns or () if name not in names]
        if missing:
            raise ValueError(f"{self.file.path} has no column {missing[0]!r}; it has {', '.join(map(repr, names))}")


def check_unicode(text: str) -> None:
    r"""Raises ValueError for half of a surrogate pair (JSON can spell it, "\ud800"), which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair in the text, which is not valid Unicode") from error


def is_record(chunk: Chunk, index: int) -> bool:
    """False for what is blank between the records, or was refused by the reader."""
    record = chunk.records[index]
    return chunk.kind == "text" or bool(record.strip(_JSON_BLANK) if isinstance(record, bytes) else record)


def record_json(chunk: Chunk, index: int) -> dict[str, Any]:
    """The record as a dict. Raises ValueError with the reason if it is not a JSON object, as the standard library decides."""
    record = chunk.records[index]
    if isinstance(record, dict):
        return record
    text = _decode(record)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError("invalid JSON") from error
    except ValueError as error:  # Python refuses to convert thousands of digits
        raise ValueError("JSON with too long a number") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def record_text(chunk: Chunk, index: int, key: str) -> str:
    """The document in a record: its field `key`, or a whole text file. Raises ValueError with the reason if there is none."""
    if chunk.kind == "text":
        return _decode(cast(bytes, chunk.records[index]))
    content = record_json(chunk, index)
    if key not in content:
        raise ValueError(f"no key {key!r}")
    text = content[key]
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is not a string but {type(text).__name__}")
    check_unicode(text)
    return text


def chunk_texts(chunk: Chunk, key: str) -> tuple[list[str], list[int], list[Skipped]]:
    """The documents of a chunk, their indices in it, and what was skipped, each in order.

    As `record_text` for every record, but orjson decodes what it accepts: it knows no value that the standard library does not.
    """
    texts: list[str] = []
    indices: list[int] = []
    skipped = list(chunk.skipped)
    fast = _FAST[chunk.kind]
    for index, record in enumerate(chunk.records):
        try:
            text = fast(record)[key]
        except (ValueError, KeyError, TypeError):
            text = None
        if text.__class__ is not str:
            if not is_record(chunk, index):
                continue
            try:
                text = record_text(chunk, index, key)
            except ValueError as error:
                skipped.append(Skipped(chunk.where(index), str(error)))
                continue
        if text:
            texts.append(text)
            indices.append(index)
        else:
            skipped.append(Skipped(chunk.where(index), "empty text", bad=False))
    return texts, indices, skipped


_FAST: dict[Kind, Callable[[Any], Any]] = {"json": orjson.loads, "row": lambda row: row, "text": lambda document: {}}


def _decode(record: bytes) -> str:
    try:
        return record.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the record)") from error
