"""Writing token files: data streams into temporary files, and a data set exists whole or not at all.

The format is described in `indexed.py`. `IndexedWriter` takes documents and is what the preprocessing commands and tests use;
`StagedFiles` is the layer below, for `prepare/merge.py` and `prepare/shuffle.py`, which move bytes and not documents.
`Journal` remembers how far an interrupted command came.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import BLOCK, DTYPES, HEADER, MAGIC, DatasetMeta, IntArray

SUFFIXES = (".bin", ".roles.bin", ".meta.json", ".idx")  # put in place in this order: the index makes it a data set
BUFFER_BYTES = 1 << 20


class StagedFiles:
    """The files of one data set under temporary names, locked against a second writer.

    Attributes:
        bin, roles: open files for token ids of `dtype` and role bytes (None without roles), back to back.
        idx: open file for the int32 length of each sequence, after space for the header; `finish` adds the rest.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, roles: bool):
        """Raises ValueError if another process writes this prefix. What an earlier process left is kept until `cut`."""
        self.prefix = str(prefix)
        self.dtype: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if known == np.dtype(dtype))
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self.bin = open_exclusive(f"{self.prefix}.bin.tmp")
        self.idx = open_exclusive(f"{self.prefix}.idx.tmp")
        self.roles = open_exclusive(f"{self.prefix}.roles.bin.tmp") if roles else None

    def cut(self, sequences: int, tokens: int) -> None:
        """Forget what lies after so many sequences and tokens, and go on from there. Raises ValueError if there is less."""
        wanted = [(self.bin, tokens * self.dtype.itemsize), (self.roles, tokens)]
        for file, size in wanted:
            if file is not None:
                _cut(file, size)
        _cut(self.idx, HEADER.size + 4 * sequences, hole=HEADER.size)

    def sync(self) -> None:
        """Return when everything written so far is on disk."""
        for file in filter(None, (self.bin, self.roles, self.idx)):
            file.flush()
            os.fsync(file.fileno())

    def finish(self, meta: DatasetMeta | None, documents: Iterable[IntArray] | None = None) -> None:
        """Complete the index and the description, all on disk under temporary names.

        `documents` gives blocks of document indices, the number of sequences last; without it every sequence is a document.
        """
        self.idx.flush()
        sequences = (os.fstat(self.idx.fileno()).st_size - HEADER.size) // 4
        self.idx.seek(HEADER.size + 4 * sequences)
        start = 0
        for first in range(0, sequences, BLOCK):
            sizes = self._lengths(first, min(BLOCK, sequences - first)).astype("<i8") * self.dtype.itemsize
            ends = start + np.cumsum(sizes)
            self.idx.write((ends - sizes).data)
            start = int(ends[-1])
        indices = 0
        for block in _each_its_own(sequences) if documents is None else documents:
            self.idx.write(np.ascontiguousarray(block, "<i8").data)
            indices += len(block)
        self.idx.seek(0)
        self.idx.write(HEADER.pack(MAGIC, 1, self._code, sequences, indices))
        if meta is not None:
            with open(f"{self.prefix}.meta.json.tmp", "wb") as file:
                file.write(json.dumps(dataclasses.asdict(meta), indent=2).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self.sync()

    def _lengths(self, first: int, count: int) -> npt.NDArray[np.int32]:
        return np.frombuffer(os.pread(self.idx.fileno(), 4 * count, HEADER.size + 4 * first), "<i4")

    def close(self, keep: bool = False) -> None:
        """Close what is open and remove temporary files, unless they are to be continued."""
        for file in filter(None, (self.bin, self.roles, self.idx)):
            file.close()
        if not keep:
            remove_staged(self.prefix)


def check_prefix(prefix: str | Path) -> None:
    """Raises ValueError for a prefix of files that would have no name before the suffix, and be hidden."""
    if os.path.basename(prefix) in ("", ".", ".."):
        raise ValueError(f"--output {str(prefix)!r} ends without a name for the files; give a prefix, like FOLDER/NAME")


def publish(prefix: str | Path, *, roles: bool, meta: bool) -> None:
    """Put finished temporary files in place of the data set, if any, that has this name. If interrupted, call it again.

    The old `.idx` goes first: without it, no reader takes the new `.bin` for the old one.
    """
    if not Path(f"{prefix}.idx.tmp").exists():
        return  # the last one is in place already
    _unlink(f"{prefix}.idx")
    for suffix in SUFFIXES[:-1]:
        if not {".roles.bin": roles, ".meta.json": meta}.get(suffix, True):
            _unlink(f"{prefix}{suffix}")
        elif Path(f"{prefix}{suffix}.tmp").exists():
            os.replace(f"{prefix}{suffix}.tmp", f"{prefix}{suffix}")
    sync_folder(prefix)
    os.replace(f"{prefix}.idx.tmp", f"{prefix}.idx")
    sync_folder(prefix)


def remove_dataset(prefix: str | Path) -> None:
    """Delete the files of a data set, the index first."""
    for suffix in reversed(SUFFIXES):
        _unlink(f"{prefix}{suffix}")


def remove_staged(prefix: str | Path) -> None:
    """Delete the temporary files of a data set."""
    for suffix in SUFFIXES:
        _unlink(f"{prefix}{suffix}.tmp")


class IndexedWriter:
    """Streams documents into `PREFIX.*.tmp` and puts the finished files in place on leaving the `with` block.

    Memory does not grow with the data. After an exception an older data set of that name is untouched, and of the new one
    nothing is left, or only temporary files if `checkpoint` was called: another writer continues them with what it returned.

    Attributes:
        meta: written to `.meta.json` with the counts filled in; None: no such file.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: npt.DTypeLike,
        meta: DatasetMeta | None = None,
        roles: bool = False,
        *,
        allow_empty: bool = False,
        empty_documents: bool = False,
        resume: dict[str, int] | None = None,
    ):
        """`roles`: every document comes with role bytes. `allow_empty`: a data set without documents is no mistake, nor, with
        `empty_documents`, is a document without tokens.

        Raises ValueError if another process writes this prefix, or if the files are shorter than `resume` says.
        """
        self.prefix, self.meta, self._allow_empty, self._least = str(prefix), meta, allow_empty, 0 if empty_documents else 1
        self._files = StagedFiles(prefix, dtype, roles)
        self._limit = np.iinfo(self._files.dtype).max
        self._counts = dict(resume) if resume else {"documents": 0, "tokens": 0, "max_token_id": -1}
        self._kept = resume is not None
        self._finished = False
        try:
            self._files.cut(self.documents, self.tokens)
        except ValueError:
            self._files.close()
            raise

    def add_document(self, tokens: IntArray, roles: npt.NDArray[np.uint8] | None = None) -> None:
        """Append one document: integer ids [n], and with `roles=True` uint8 [n]. Raises ValueError for ids it cannot hold."""
        self.add_documents(tokens, np.array([len(tokens)]), roles)

    def add_documents(self, tokens: IntArray, lengths: IntArray, roles: npt.NDArray[np.uint8] | None = None) -> None:
        """Append documents back to back: integer ids [n], tokens of each document [d], and with `roles=True` uint8 [n].

        Raises ValueError naming the document if it is empty and must not be, or has ids that do not fit.
        """
        assert (roles is None) == (self._files.roles is None), "role bytes are given for all documents or for none"
        assert int(lengths.sum()) == len(tokens) and (roles is None or len(roles) == len(tokens))
        if len(lengths) == 0:
            return
        if lengths.min() < self._least:
            raise ValueError(f"{self.prefix}: document {self.documents + int(np.argmax(lengths < 1))} has no tokens")
        if lengths.max() > np.iinfo(np.int32).max:
            at = int(np.argmax(lengths))
            raise ValueError(f"{self.prefix}: document {self.documents + at} has {lengths[at]} tokens; .idx counts in int32")
        largest, smallest = (int(tokens.max()), int(tokens.min())) if len(tokens) else (-1, 0)
        if smallest < 0 or largest > self._limit:
            at = int(np.argmax((tokens < 0) | (tokens > self._limit)))
            document = self.documents + int(np.searchsorted(np.cumsum(lengths), at, side="right"))
            raise ValueError(
                f"{self.prefix}: document {document} has token id {tokens[at]}, "
                f"outside 0..{self._limit} of {self._files.dtype.name}; write it with a larger dtype"
            )
        self._files.bin.write(np.ascontiguousarray(tokens, self._files.dtype).data)
        self._files.idx.write(np.ascontiguousarray(lengths, "<i4").data)
        if self._files.roles is not None and roles is not None:
            self._files.roles.write(np.ascontiguousarray(roles, np.uint8).data)
        self._counts["documents"] += len(lengths)
        self._counts["tokens"] += len(tokens)
        self._counts["max_token_id"] = max(self._counts["max_token_id"], largest)

    @property
    def documents(self) -> int:
        return self._counts["documents"]

    @property
    def tokens(self) -> int:
        return self._counts["tokens"]

    def checkpoint(self) -> dict[str, int]:
        """Put on disk what was added so far. Returns what a writer that continues here must be given as `resume`."""
        self._files.sync()
        self._kept = True
        return dict(self._counts)

    def finish(self) -> None:
        """Everything on disk, complete, under temporary names: after this only renames are left to do.

        Raises ValueError if there is not one document.
        """
        if not self.documents and not self._allow_empty:
            raise ValueError(f"{self.prefix}: no document was written, so there is no data set to make")
        if self.meta is not None:
            self.meta = dataclasses.replace(self.meta, **self._counts)  # type: ignore[arg-type]
        self._files.finish(self.meta)
        self._finished = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        done = False
        try:
            if kind is None:
                if not self._finished:
                    self.finish()
                publish(self.prefix, roles=self._files.roles is not None, meta=self.meta is not None)
                done = True
        finally:
            self._files.close(keep=self._kept and not done)


class Journal:
    """What an interrupted command must know to continue: lines of JSON, of which the last whole one counts.

    The file is locked while it is open, so of two equal commands the second is refused.

    Attributes:
        entry: what was saved last by a command with the same `made_by`, None if there is nothing to continue.
        abandoned: what was saved last, if that was by another command. It is forgotten already.
    """

    def __init__(self, path: str | Path, made_by: str):
        """`made_by`: digest of everything that determines the result. Raises ValueError if another process has it open."""
        self.path, self._made_by = str(path), made_by
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open_exclusive(path)
        self.entry: dict[str, Any] | None = None
        self.abandoned: dict[str, Any] | None = None
        end = 0
        for line in self._file:
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                content = None
            if content is None:
                break  # the machine died while it was written
            end += len(line)
            self.entry = content["entry"]
            self.abandoned = None
            if content["made_by"] != made_by:
                self.entry, self.abandoned = None, content["entry"]
        _cut(self._file, 0 if self.entry is None else end)
        sync_folder(path)

    def save(self, entry: dict[str, Any]) -> None:
        """Remember `entry`, on disk when this returns."""
        self._file.write(json.dumps({"made_by": self._made_by, "entry": entry}).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.entry = entry

    def forget(self) -> None:
        """Start over: there is nothing to continue any more."""
        self.entry = self.abandoned = None
        _cut(self._file, 0)

    def close(self) -> None:
        """Let go of the file; it stays if there is something to continue."""
        if self._file.closed:
            return
        if self.entry is None:
            _unlink(self.path)
        self._file.close()

    def remove(self) -> None:
        """Nothing is left to continue."""
        self.entry = None
        self.close()


def open_exclusive(path: str | Path) -> IO[bytes]:
    """Open for reading and writing, made if missing, locked against a second writer (where the file system has locks)."""
    while True:
        file = open(path, "r+b", BUFFER_BYTES, opener=_open_or_make)  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"{path} is being written by another process; give each one its own --output") from None
        except OSError:
            pass  # some network file systems have no locks
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        file.close()  # between open and lock its owner renamed it: it is finished data now, not ours


def _open_or_make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def sync_folder(path: str | Path) -> None:
    """Return when the names in the folder of `path` are on disk."""
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _each_its_own(sequences: int) -> Iterable[IntArray]:
    """Document indices of documents of one sequence each: 0, 1, ..., sequences, in blocks."""
    for first in range(0, sequences + 1, BLOCK):
        yield np.arange(first, min(first + BLOCK, sequences + 1), dtype="<i8")


def _cut(file: IO[bytes], size: int, hole: int = 0) -> None:
    """Truncate to `size` and go there. Raises ValueError if the file is shorter; the first `hole` bytes may be missing."""
    present = os.fstat(file.fileno()).st_size
    if present < size and size > hole:
        raise ValueError(f"{file.name} has {present} bytes, its journal says {size}; it was changed: delete the journal")
    file.truncate(size)
    file.seek(size)


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)
