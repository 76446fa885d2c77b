"""From the records of a chunk to documents and their variants, with an account of every record.

A record may give several conversations, or none. What is counted is conversations: documents and skipped ones together are
the conversations of all records, where a record that gives none counts as one that is skipped. `ChatEncoder` in `chat.py`
calls `encode_chunk`; `chat.py` also finds the files with `group_trees`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_llm.data.prepare.chunks import Chunk, InputFile, Skipped, is_record, record_json, record_text
from megatron_llm.data.prepare.conversations import ALIASES, FORMATS, decoded, recognize
from megatron_llm.data.prepare.documents import Conversation, Document, Found, Made
from megatron_llm.data.prepare.inputs import read_chunks
from megatron_llm.data.prepare.mapping import Mapping, read_mapping
from megatron_llm.data.prepare.pipeline import Encoded
from megatron_llm.data.prepare.trees import is_row
from megatron_llm.data.prepare.turns import Record
from megatron_llm.data.prepare.variants import VARIANTS

AUTO = "auto"
PEEK_BYTES = 1 << 16

Encode = Callable[[Sequence[tuple[str, Document]]], Sequence[Made | ValueError]]
"""Tokens of each of some documents, which come with the names of their records, or why there are none."""


@dataclass(frozen=True)
class RecordReader:
    """What the user says about the records: `format` is a name in `FORMATS` or "auto"; a mapping goes before it."""

    format: str = AUTO
    mapping: Mapping | None = None

    def read(self, record: Record) -> tuple[str, Callable[[], Found]]:
        """Name of the format, and a function that gives the documents or raises ValueError. Raises ValueError for no format."""
        mapping = self.mapping
        if mapping is not None:
            return "mapped", lambda: [Conversation({"messages": mapping.messages(record)})]
        record = decoded(record)
        known = recognize(record) if self.format == AUTO else FORMATS[self.format]
        return known.name, lambda: known.documents(record)


def open_reader(record_format: str, mapping: Sequence[str]) -> RecordReader:
    """The reader for `--format` and `--map`. Raises ValueError if they name none, or both are given."""
    name = ALIASES.get(record_format, record_format)
    if name != AUTO and name not in FORMATS:
        close = difflib.get_close_matches(name, [*FORMATS, *ALIASES], 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"--format {record_format}: {hint}known: {AUTO}, {', '.join(FORMATS)}")
    if mapping and name != AUTO:
        raise ValueError(f"--format {record_format} with --map: a mapping says all about the records; leave one of them out")
    return RecordReader(name, read_mapping(mapping) if mapping else None)


def check_variants(names: Sequence[str]) -> None:
    """Raises ValueError for names of no variants, or one given twice."""
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"--variants {name}: known: {', '.join(VARIANTS)}")
        if names.count(name) > 1:
            raise ValueError(f"--variants names {name} twice")


def group_trees(files: Sequence[InputFile], reader: RecordReader) -> list[InputFile]:
    """The inputs, with files of rows of message trees as one: a tree may be spread over all of them.

    By the first record of each file, where the format is found or is that of trees.
    """
    if reader.mapping is not None or not (reader.format == AUTO or FORMATS[reader.format].name.startswith("oasst")):
        return list(files)
    rows = [file for file in files if is_row(_first_record(file))]
    if not rows:
        return list(files)
    size = sum(file.end - file.start for file in rows)
    together = InputFile(rows[0].path, "trees", "", size, "", 0, size, parts=tuple(rows))
    return [together if file is rows[0] else file for file in files if file is rows[0] or file not in rows]


def _first_record(file: InputFile) -> Record:
    """The first JSON object in a file, looking at its beginning only; empty if there is none."""
    with closing(read_chunks([file], chunk_bytes=PEEK_BYTES)) as chunks:  # type: ignore[type-var]
        for chunk in chunks:
            for index in range(len(chunk.records)):
                if chunk.kind != "text" and is_record(chunk, index):
                    try:
                        return record_json(chunk, index)
                    except ValueError:
                        continue
            return {}
    return {}


def record_of(chunk: Chunk, index: int) -> Record:
    """A record as a dict. A text file is a record with its `text`; of a table, nested fields that are null are left out.

    A row has all fields of its table, and a template would show them: the schema of one tool would name the arguments of all
    others. Raises ValueError if it is not a JSON object.
    """
    if chunk.kind == "text":
        return {"text": record_text(chunk, index, "text")}
    record = record_json(chunk, index)
    return {key: _unpadded(value) for key, value in record.items()} if chunk.kind == "row" else record


def _unpadded(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpadded(item) for item in value]
    if isinstance(value, dict):
        return {key: _unpadded(item) for key, item in value.items() if item is not None}
    return value


def encode_chunk(chunk: Chunk, reader: RecordReader, variants: Sequence[str], encode: Encode) -> Encoded:
    """Documents of a chunk in the order of its records: in output 0, and with as many, maybe empty ones, one output a variant."""
    formats: Counter[str] = Counter()
    found: list[tuple[str, Document | ValueError]] = []
    for index in range(len(chunk.records)):
        if is_record(chunk, index):
            where = chunk.where(index)
            try:
                name, documents = reader.read(record_of(chunk, index))
                formats[name] += 1
                several = documents()
            except ValueError as error:
                found.append((where, error))
                continue
            if len(several) == 1:
                found.append((where, several[0]))
            else:
                found += [(f"{where} conversation {number}", one) for number, one in enumerate(several, 1)]
    records = len(chunk.skipped) + sum(is_record(chunk, index) for index in range(len(chunk.records)))
    made = iter(encode([(where, one) for where, one in found if not isinstance(one, ValueError)]))
    skipped, taken = list(chunk.skipped), _Taken(variants)
    for where, one in found:
        result = one if isinstance(one, ValueError) else next(made)
        if isinstance(one, ValueError) or isinstance(result, ValueError):
            skipped.append(Skipped(where, str(result)))
        else:
            taken.documents.append((where, one))
            taken.made.append(result)
    return taken.encoded(encode, skipped, records, formats)


class _Taken:
    """The documents that can be used, and what became of them."""

    def __init__(self, variants: Sequence[str]):
        self.variants = variants
        self.documents: list[tuple[str, Document]] = []
        self.made: list[Made] = []

    def encoded(self, encode: Encode, skipped: list[Skipped], records: int, formats: Counter[str]) -> Encoded:
        notes = Counter(note for made in self.made for note in made.notes)
        notes.update(what for _, one in self.documents if isinstance(one, Conversation) for what in one.changed)
        missing: Counter[str] = Counter()
        outputs = [self.made] + [self._variant(name, encode, missing) for name in self.variants]
        flat = [_NOTHING] + [made for output in outputs for made in output]
        lengths = np.array([len(made.ids) for made in flat[1:]], np.int64)
        sides = np.repeat(np.arange(len(outputs), dtype=np.uint8), len(self.made)) if self.variants else None
        ids, roles = np.concatenate([made.ids for made in flat]), np.concatenate([made.roles for made in flat])
        return Encoded(ids, lengths, skipped, roles, sides, notes=notes, records=records, formats=formats, missing=missing)

    def _variant(self, name: str, encode: Encode, missing: Counter[str]) -> list[Made]:
        """A document for each of the originals, an empty one where there is no such variant; the reasons go into `missing`."""
        found: list[tuple[str, Document] | ValueError] = []
        for where, document in self.documents:
            try:
                found.append((where, VARIANTS[name](document)))
            except ValueError as error:
                found.append(error)
        made = iter(encode([one for one in found if not isinstance(one, ValueError)]))
        output = []
        for one in found:
            result = one if isinstance(one, ValueError) else next(made)
            if isinstance(result, Made):
                output.append(result)
            else:
                missing[f"{name}: {result}"] += 1
                output.append(_NOTHING)
        return output


_NOTHING = Made(np.empty(0, np.int32), np.empty(0, np.uint8))
