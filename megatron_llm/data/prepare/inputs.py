"""Reading input files record by record: the lines of `.jsonl` and `.jsonl.gz`, or a whole `.txt` file.

`preprocess.py` drives this in the main process and hands batches of raw records to workers.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

LINE_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz")


@dataclass(frozen=True)
class Record:
    """One undecoded line, or one whole text file (line 0)."""

    file: str
    line: int
    raw: bytes

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    def text(self) -> str:
        """The record as text. Raises ValueError if it is not UTF-8."""
        try:
            return self.raw.decode("utf-8-sig" if self.line <= 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {error.start} of the record)") from error

    def json(self) -> dict[str, Any]:
        """The record as a JSON object. Raises ValueError if it is not one."""
        try:
            content = json.loads(self.text())
        except json.JSONDecodeError as error:
            raise ValueError("invalid JSON") from error
        except RecursionError as error:
            raise ValueError("JSON nested too deeply") from error
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content


def check_inputs(paths: Sequence[str | Path]) -> None:
    """Raises ValueError with every input that is missing or of an unknown kind."""
    problems = []
    for path in map(Path, paths):
        if not path.is_file():
            problems.append(f"{path} is not a file")
        elif not path.name.endswith(LINE_SUFFIXES + TEXT_SUFFIXES):
            problems.append(f"{path} has an unknown suffix; known: {', '.join(LINE_SUFFIXES + TEXT_SUFFIXES)}")
    if not paths:
        problems.append("no input files")
    if problems:
        raise ValueError("; ".join(problems))


def read_records(paths: Sequence[str | Path], advance: Callable[[int], object]) -> Iterator[Record]:
    """All records in order; blank lines are none. `advance` gets the bytes read from disk since it was last called.

    Raises ValueError naming the file if a compressed file is damaged.
    """
    for path in map(str, paths):
        with open(path, "rb") as raw:
            file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.endswith(".gz") else raw
            done = 0
            try:
                lines = enumerate(file, 1) if path.endswith(LINE_SUFFIXES) else iter([(0, file.read())])
                for number, line in lines:
                    if line.strip():
                        yield Record(path, number, line)
                    position = raw.tell()
                    advance(position - done)
                    done = position
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path} is damaged after {done} bytes: {error}") from error


def batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Consecutive records, about `size` bytes together."""
    batch: list[Record] = []
    total = 0
    for record in records:
        batch.append(record)
        total += len(record.raw)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
