"""Readers of files that are bytes from one end to the other: JSON in three layouts, csv and text.

They cut at record boundaries and hold one chunk at a time. JSON is not decoded here but only cut into values, by a scanner of
brackets and strings: so a value that is wrong costs one record and not the rest of the file, every cut is a byte offset from
which reading can go on, and a value of an array means what `json.loads` says. (A streaming parser, ijson, gives "?" for half
a surrogate pair, and ends at a NaN or at an integer of more than 64 bits.) `inputs.py` calls the readers.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from megatron_llm.data.prepare.chunks import CHUNK_BYTES, Chunk, InputFile, Job, Kind, Skipped, Unit
from megatron_llm.data.prepare.streams import ByteStream, line_start

BOM = b"\xef\xbb\xbf"
DELIMITERS = {"csv": ",", "tsv": "\t"}
_WHITE = b" \t\r\n"
# An object without another or a list in it (twice as fast on short records); a bracket or comma; a string, closed or not.
_TOKEN = re.compile(rb'(\{(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+\})|([\[\]{},])|"(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_STRING_REST = re.compile(rb'(?:[^"\\]++|\\.)*+("?)', re.DOTALL)

Item = tuple[int, Any, str]
"""(byte offset behind a record, the record, why it is refused if it is)"""


def json_layout(file: InputFile) -> str:
    """How a `.json` file holds its records, by its first bytes: "array", "values" (one after the other) or "lines".

    Values are what begins like an object whose first line is not one: printed over several lines, or several on a line. Where
    that object is broken, it may be just a bad line: a whole object on any line further down says so.
    """
    with ByteStream(file) as stream:
        head = stream.read(CHUNK_BYTES).removeprefix(BOM).lstrip(_WHITE).decode(errors="replace")
    if head.startswith("["):
        return "array"
    first, *others = head.split("\n")
    if not first.startswith("{") or _accepts(json.loads, first):
        return "lines"
    if _accepts(json.JSONDecoder().raw_decode, head):
        return "values"
    return "lines" if any(line.startswith("{") and _accepts(json.loads, line) for line in others) else "values"


def _accepts(decode: Callable[[str], Any], text: str) -> bool:
    try:
        decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_lines(job: Job) -> Iterator[Chunk]:
    """JSON lines. Only a line feed ends a line: whatever else looks like a line end may stand inside a JSON string."""
    file, stop = job.file, None
    if job.at:
        offset, before = job.at
    else:
        offset = line_start(file, file.start)
        before = -1 if offset else 0
    if not file.compression:
        stop = line_start(file, file.end)
    with ByteStream(file, offset, stop) as stream:
        for size, data in _whole_lines(stream, job):
            first = before + 1
            if data is None:
                records = [b""]
                skipped = [Skipped(f"{file.path}:{first}" if first else f"{file.path} at byte {offset}", job.too_large)]
            else:
                records = (data if offset else data.removeprefix(BOM)).split(b"\n")
                skipped = []
                if not records[-1]:
                    records.pop()
            before = before + len(records) if first else -1
            end = (job.number, offset + size, before)
            yield Chunk(file.path, "json", "line", records, first, offset, size, stream.disk_bytes(), end, skipped)
            offset += size


def _whole_lines(stream: ByteStream, job: Job) -> Iterator[tuple[int, bytes | None]]:
    """(length, content) of consecutive pieces of whole lines. A line that is too large comes alone and without content."""
    pieces: list[bytes] = []  # of the line that is not complete yet
    held = 0
    while block := stream.read(job.chunk_bytes):
        first = block.find(b"\n") + 1
        if first and held + first - 1 > job.max_record_bytes:
            yield held + first, None
            pieces, held, block = [], 0, block[first:]
        last = block.rfind(b"\n") + 1
        if last:
            yield held + last, b"".join([*pieces, block[:last]])
            pieces, held, block = [], 0, block[last:]
        held += len(block)
        if held <= job.max_record_bytes:
            pieces.append(block)
        else:
            pieces.clear()
    if held:
        yield held, b"".join(pieces) if held <= job.max_record_bytes else None


def read_values(job: Job) -> Iterator[Chunk]:
    """The elements of a JSON array, or JSON values one after the other.

    Raises ValueError if an array does not end, or something follows it.
    """
    offset, _ = job.at or (0, 0)
    with ByteStream(job.file, offset) as stream:
        scanner = _Scanner(stream, job, offset)
        values = _array_elements(scanner, job, offset) if job.file.format == "array" else _concatenated(scanner)
        yield from _gather(job, stream, offset, "json", "record", (item for item in values if item[1] or item[2]))


class _Scanner:
    """The brackets and commas of JSON outside of its strings, and the bytes between any two of them."""

    def __init__(self, stream: ByteStream, job: Job, offset: int) -> None:
        self._stream, self._job = stream, job
        self._data, self._offset = b"", offset  # of which the first byte is at `offset` of the file
        self._begin = 0  # of the current value in the data
        self._lost = 0  # bytes of the current value that were let go of, because it is too large

    def tokens(self) -> Iterator[tuple[bytes, int]]:
        """(bracket or comma, its offset in the file)"""
        in_string, scanned = False, 0
        while block := self._stream.read(self._job.chunk_bytes):
            done = scanned if len(self._data) - self._begin > self._job.max_record_bytes else self._begin
            self._lost += done - self._begin
            self._data, self._offset = self._data[done:] + block, self._offset + done
            self._begin, scanned = 0, scanned - done
            if in_string:
                rest = _STRING_REST.match(self._data, scanned)
                assert rest
                in_string, scanned = not rest[1], rest.end()
            if not in_string:
                for match in _TOKEN.finditer(self._data, scanned):
                    if match[1]:
                        yield b"{", self._offset + match.start()
                        yield b"}", self._offset + match.end() - 1
                    elif match[2]:
                        yield match[2], self._offset + match.start()
                    elif not match[3]:
                        in_string, scanned = True, match.end()
            scanned = scanned if in_string else len(self._data)

    def cut(self, end: int, behind: int) -> Item:
        """The value up to offset `end`, without white space. The next one begins at `behind`."""
        stop = end - self._offset
        value, size = self._data[self._begin : stop], stop - self._begin + self._lost
        if self._offset + self._begin == 0:
            value = value.removeprefix(BOM)
        self._begin, self._lost = behind - self._offset, 0
        if size > self._job.max_record_bytes:
            return behind, b"", self._job.too_large
        return behind, value.strip(_WHITE), ""

    def rest(self) -> Item:
        """What is left when there are no more tokens."""
        end = self._offset + len(self._data)
        return self.cut(end, end)


def _array_elements(scanner: _Scanner, job: Job, offset: int) -> Iterator[Item]:
    """What stands between the commas. At depth -1 the array has not begun, or is over."""
    depth, ended = 0 if offset else -1, False
    for token, place in scanner.tokens():
        if ended:
            break
        if token in b"[{":
            depth += 1
            if depth == 0:
                scanner.cut(place + 1, place + 1)
        elif depth > 0:
            depth -= token in b"]}"
        elif token == b",":
            yield scanner.cut(place, place + 1)
        elif token == b"]":  # reading goes on before it, so that it is also seen then
            yield scanner.cut(place, place)
            scanner.cut(place + 1, place + 1)
            depth, ended = -1, True
    end, rest, problem = scanner.rest()
    if not ended:
        raise ValueError(f"{job.file.path} ends inside its array, after {end:,} bytes; was it cut off?")
    if rest or problem:
        raise ValueError(f"{job.file.path} goes on behind the end of its array, before byte {end:,}")


def _concatenated(scanner: _Scanner) -> Iterator[Item]:
    """Values by their brackets; what stands between two of them is a value as well, a wrong one unless it is blank."""
    depth = 0
    for token, place in scanner.tokens():
        if token in b"[{":
            if depth == 0:
                yield scanner.cut(place, place)
            depth += 1
        elif depth > 0 and token in b"]}":
            depth -= 1
            if depth == 0:
                yield scanner.cut(place + 1, place + 1)
    yield scanner.rest()


def read_csv(job: Job) -> Iterator[Chunk]:
    """Rows of csv and tsv files as dicts by the names in the first row that is not blank; all values are strings.

    Raises ValueError if a column is missing or doubled, and for a field or a line that is too large: that is nearly always a
    quote that is never closed, and no later row could be trusted.
    """
    with ByteStream(job.file) as stream:
        rows = _csv_rows(stream, job, 0)
        start, header, problem = next((row for row in rows if row[1] or row[2]), (0, [], ""))
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice or problem:
        raise ValueError(f"{job.file.path}, first row: {problem or f'more than one column is named {twice[0]!r}'}")
    if header:
        job.check_columns(header)
    offset, _ = job.at or (start, 0)
    with ByteStream(job.file, offset) as stream:
        yield from _gather(job, stream, offset, "row", "row", _dicts(_csv_rows(stream, job, offset), header, job.columns))


def _csv_rows(stream: ByteStream, job: Job, offset: int) -> Iterator[Item]:
    """(byte offset behind a row, its fields, what is wrong with it).

    Python's reader gives a row when its last line is complete. If it asks for one more and there is none, a quote is open, and it
    says nothing.
    """
    problem, open_, ended = "", False, False

    def lines() -> Iterator[str]:
        nonlocal offset, problem, open_, ended
        for size, data in _whole_lines(stream, job):
            if data is None:
                raise ValueError(f"{job.file.path} at byte {offset:,}: a line of {size:,} bytes, {job.too_large}")
            for line in data.splitlines(keepends=True):
                text = line if offset else line.removeprefix(BOM)
                offset, open_ = offset + len(line), True
                try:
                    yield text.decode()
                except UnicodeDecodeError as error:
                    problem = f"not UTF-8 (byte {error.start} of a line)"
                    yield text.decode(errors="replace")
        ended = True

    csv.field_size_limit(job.max_record_bytes)
    rows = csv.reader(lines(), delimiter=DELIMITERS[job.file.format])
    while True:
        begin, problem, open_ = offset, "", False
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{job.file.path} at byte {begin:,}: {error}; is a quote never closed there?") from error
        if row is None:
            return
        if ended and open_:
            problem = "a quote that is never closed"
        elif offset - begin > job.max_record_bytes:
            problem = job.too_large
        yield offset, row, problem


def _dicts(rows: Iterable[Item], header: list[str], columns: Sequence[str] | None) -> Iterator[Item]:
    wanted = [(name, place) for place, name in enumerate(header) if columns is None or name in columns]
    for end, row, problem in rows:
        if row and not problem and len(row) != len(header):
            problem = f"{len(row)} fields, but the first row has {len(header)}"
        yield end, {} if problem or not row else {name: row[place] for name, place in wanted}, problem


def _gather(job: Job, stream: ByteStream, start: int, kind: Kind, unit: Unit, items: Iterable[Item]) -> Iterator[Chunk]:
    """Chunks of records that come one by one, from byte `start` on."""
    path, before = job.file.path, job.at[1] if job.at else 0
    records: list[Any] = []
    skipped: list[Skipped] = []
    place = start

    def chunk() -> Chunk:
        end = (job.number, place, before + len(records))
        return Chunk(path, kind, unit, records, before + 1, start, place - start, stream.disk_bytes(), end, skipped)

    for place, record, problem in items:
        records.append(record)
        if problem:
            skipped.append(Skipped(f"{path} {unit} {before + len(records)}", problem))
        if place - start >= job.chunk_bytes:
            yield chunk()
            before, start, records, skipped = before + len(records), place, [], []
    if records:
        yield chunk()


def read_text(job: Job) -> Iterator[Chunk]:
    """The whole file as one document."""
    if job.at:
        return
    path, pieces, held = job.file.path, [], 0
    with ByteStream(job.file) as stream:
        while held <= job.max_record_bytes and (block := stream.read(job.chunk_bytes)):
            pieces.append(block)
            held += len(block)
    records, skipped = [b"".join(pieces).removeprefix(BOM)], []
    if held > job.max_record_bytes:
        records, skipped = [], [Skipped(path, job.too_large)]
    yield Chunk(path, "text", "file", records, 1, 0, held, job.file.size, (job.number, 1, 1), skipped)
