"""Writing token files: documents stream into temporary files, and a data set exists whole or not at all.

The format is described in `indexed.py`. Called by `prepare/preprocess.py`, and by tests that need data.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from array import array
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import BLOCK, DTYPES, HEADER, MAGIC, DatasetMeta, IntArray


class IndexedWriter:
    """Streams documents into `PREFIX.*.tmp` and puts the finished files in place on leaving the `with` block.

    Memory is 4 bytes a document. The `.idx` is renamed last, so a data set either exists whole or not at all; after an
    exception nothing of it is left, and an older data set of that name is untouched.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, meta: DatasetMeta | None = None, roles: bool = False):
        """`roles`: every document comes with role bytes. Raises ValueError if another process writes this prefix."""
        self.prefix = str(prefix)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if known == np.dtype(dtype))
        self._limit = np.iinfo(self._dtype).max
        self._meta = meta
        self._lengths = array("i")
        self._tokens = 0
        self._max_token_id = -1
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = _open_exclusive(Path(self.prefix + ".bin.tmp"))
        self._roles = _open_exclusive(Path(self.prefix + ".roles.bin.tmp")) if roles else None

    def add_document(self, tokens: IntArray, roles: npt.NDArray[np.uint8] | None = None) -> None:
        """Append one document: integer ids [n], and with `roles=True` uint8 [n]. Raises ValueError for ids it cannot hold."""
        if len(tokens) == 0:
            raise ValueError(f"{self.prefix}: document {len(self._lengths)} has no tokens")
        largest, smallest = int(tokens.max()), int(tokens.min())
        if smallest < 0 or largest > self._limit:
            raise ValueError(
                f"{self.prefix}: document {len(self._lengths)} has token id {smallest if smallest < 0 else largest}, "
                f"outside 0..{self._limit} of {self._dtype.name}; write it with a larger dtype"
            )
        if len(tokens) > np.iinfo(np.int32).max:
            raise ValueError(f"{self.prefix}: document {len(self._lengths)} has {len(tokens)} tokens; .idx counts in int32")
        assert (roles is None) == (self._roles is None), "role bytes are given for all documents or for none"
        self._bin.write(np.ascontiguousarray(tokens, self._dtype).data)
        if self._roles is not None and roles is not None:
            assert len(roles) == len(tokens)
            self._roles.write(np.ascontiguousarray(roles, np.uint8).data)
        self._lengths.append(len(tokens))
        self._tokens += len(tokens)
        self._max_token_id = max(self._max_token_id, largest)

    @property
    def documents(self) -> int:
        return len(self._lengths)

    @property
    def tokens(self) -> int:
        return self._tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            for file in filter(None, (self._bin, self._roles)):
                file.close()
            for suffix in (".bin", ".roles.bin", ".meta.json", ".idx"):
                Path(f"{self.prefix}{suffix}.tmp").unlink(missing_ok=True)

    def _commit(self) -> None:
        """Write `.idx` and `.meta.json`, force all to disk, rename; Raises ValueError if there is not one document."""
        if not self._lengths:
            raise ValueError(f"{self.prefix}: no document was written, so there is no data set to make")
        suffixes = [".bin"]
        for file in filter(None, (self._bin, self._roles)):
            _flush_to_disk(file)
        if self._roles is not None:
            suffixes.append(".roles.bin")
        if self._meta is not None:
            counts = {"documents": self.documents, "tokens": self.tokens, "max_token_id": self._max_token_id}
            content = dataclasses.asdict(dataclasses.replace(self._meta, **counts))  # type: ignore[arg-type]
            with open(self.prefix + ".meta.json.tmp", "wb") as file:
                file.write(json.dumps(content, indent=2).encode() + b"\n")
                _flush_to_disk(file)
            suffixes.append(".meta.json")
        with open(self.prefix + ".idx.tmp", "wb") as file:
            self._write_index(file)
            _flush_to_disk(file)
        # The old .idx goes first: without it no reader takes the new .bin for the old one if we die in between.
        for suffix in (".idx", ".roles.bin", ".meta.json"):
            Path(self.prefix + suffix).unlink(missing_ok=True)
        for suffix in [*suffixes, ".idx"]:
            os.replace(f"{self.prefix}{suffix}.tmp", self.prefix + suffix)

    def _write_index(self, file: IO[bytes]) -> None:
        lengths = np.frombuffer(self._lengths, np.int32)
        count = len(lengths)
        file.write(HEADER.pack(MAGIC, 1, self._code, count, count + 1))
        file.write(lengths.astype("<i4", copy=False).data)
        start = 0
        for first in range(0, count, BLOCK):
            ends = start + np.cumsum(lengths[first : first + BLOCK].astype("<i8") * self._dtype.itemsize)
            file.write(np.concatenate(([start], ends[:-1])).astype("<i8").data)
            start = int(ends[-1])
        for first in range(0, count + 1, BLOCK):
            file.write(np.arange(first, min(first + BLOCK, count + 1), dtype="<i8").data)


def _open_exclusive(path: Path) -> IO[bytes]:
    """Open for writing, emptied, locked against a second writer (where the file system has locks)."""
    file = open(path, "ab")  # noqa: SIM115 - the writer closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path} is being written by another process; give each one its own --output") from None
    except OSError:
        pass  # some network file systems have no locks
    file.truncate(0)
    return file


def _flush_to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
