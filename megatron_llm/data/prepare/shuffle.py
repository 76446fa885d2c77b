"""Documents of a data set in random order, on disk and in bounded memory.

Documents are ordered by a 64-bit hash of (seed, document number), so the result is a pure function of the seed and the
documents. A first pass over the index counts what falls into each of many equal ranges of the hash, the buckets; a second
one copies every document into its bucket's part of the new files; then each bucket is sorted in memory, in its place. All
reads and writes are sequential but for the jump from bucket to bucket, and no file is written more than twice.
Called by `preprocess.py` and `merge.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_llm.data.indexed import HEADER, IndexedDataset
from megatron_llm.data.order import hash_numbers
from megatron_llm.data.writer import StagedFiles, open_exclusive, publish

BLOCK_BYTES = 16 << 20  # read at a time
BUCKET_BYTES = 32 << 20  # sorted at a time, about
MAX_BUCKETS = 1 << 14
COPIED_ITEMS = 64  # documents longer than this on average are copied one by one, others item by item
DOCUMENT_BYTES = 64  # what a document takes in memory besides its tokens, roughly
ENTRY = np.dtype([("number", "<i8"), ("sequences", "<i8"), ("tokens", "<i8")])

Int64 = npt.NDArray[np.int64]


def shuffle_dataset(
    source: str | Path, output: str | Path, seed: int, *, made_by: str | None = None, progress: bool = False
) -> None:
    """Write the documents of `source` in the order of `seed` to `output`, roles and sequences of a document included.

    `made_by` goes into the new description. Memory: a few hundred MB, or a few times the largest document. Raises ValueError if
    `source` is missing or damaged, is `output`, or if another process writes `output`. Interrupted, it leaves no data set.
    """
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(f"{output} cannot be shuffled onto itself; give another --output")
    with SourceFiles(source) as reader:
        reader.dataset.verify()
        files = StagedFiles(output, reader.dataset.dtype, roles=reader.roles is not None)
        try:
            with (
                tqdm(total=2 * reader.documents, desc="shuffle", unit="document", unit_scale=True, disable=not progress) as bar,
                open_exclusive(f"{output}.order.tmp") as order,
            ):
                files.cut(0, 0)
                _Shuffle(reader, files, order, seed, bar).run()
                meta = reader.dataset.meta
                if meta is not None:
                    meta = dataclasses.replace(meta, made_by=made_by)
                files.finish(meta, _document_indices(order, reader.documents))
            publish(output, roles=files.roles is not None, meta=meta is not None)
        finally:
            files.close()
            Path(f"{output}.order.tmp").unlink(missing_ok=True)


class SourceFiles:
    """A finished data set read by blocks with plain reads: mapped pages would count as memory of this process."""

    def __init__(self, prefix: str | Path):
        """Raises ValueError if the data set is missing or damaged."""
        self.dataset = IndexedDataset(prefix)
        self.documents = self.dataset.documents
        with ExitStack() as files:
            self.bin = files.enter_context(open(f"{prefix}.bin", "rb"))
            self.idx = files.enter_context(open(f"{prefix}.idx", "rb"))
            self.roles = files.enter_context(open(f"{prefix}.roles.bin", "rb")) if self.dataset.roles is not None else None
            self._files = files.pop_all()
        self.sequences: int = HEADER.unpack(self.idx.read(HEADER.size))[3]

    def document_indices(self, first: int, count: int) -> Int64:
        """Number of the first sequence of each of `count` documents from `first` on; of the end for `documents`."""
        self.idx.seek(HEADER.size + 12 * self.sequences + 8 * first)
        return np.frombuffer(self.idx.read(8 * count), "<i8")

    def lengths(self, first: int, count: int) -> Int64:
        """Tokens of `count` sequences from `first` on."""
        self.idx.seek(HEADER.size + 4 * first)
        return np.frombuffer(self.idx.read(4 * count), "<i4").astype(np.int64)

    def blocks(self) -> Iterator[_Block]:
        """All documents in order, about BLOCK_BYTES at a time, and at least one."""
        token = 0
        step = BLOCK_BYTES // DOCUMENT_BYTES
        for first in range(0, self.documents, step):
            indices = self.document_indices(first, min(step, self.documents - first) + 1)
            lengths = self.lengths(int(indices[0]), int(indices[-1] - indices[0]))
            ends = token + np.concatenate(([0], np.cumsum(lengths)))[indices - indices[0]]
            start, limit = 0, BLOCK_BYTES // self.dataset.dtype.itemsize
            while start < len(indices) - 1:
                stop = int(np.searchsorted(ends, ends[start] + limit, side="right")) - 1
                stop = max(stop, start + 1)
                yield _Block(first + start, indices[start : stop + 1], ends[start : stop + 1])
                start = stop
            token = int(ends[-1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()


@dataclasses.dataclass
class _Block:
    """Consecutive documents: number of the first; first sequence and first token of each, and of what follows the last."""

    first: int
    sequences: Int64
    tokens: Int64


class _Shuffle:
    """The passes. A bucket is a range of hashes; its documents, sequences and tokens have their place in the new files."""

    def __init__(self, reader: SourceFiles, files: StagedFiles, order: IO[bytes], seed: int, bar: tqdm[Any]):
        self._reader, self._files, self._order, self._seed, self._bar = reader, files, order, seed, bar
        size = len(reader.dataset.tokens) * files.dtype.itemsize + DOCUMENT_BYTES * reader.documents
        self._buckets = max(1, min(MAX_BUCKETS, -(-size // BUCKET_BYTES)))

    def run(self) -> None:
        ends = self._count()
        self._scatter(ends)
        for bucket in range(self._buckets):
            self._sort(*(int(end[bucket]) for end in ends), *(int(end[bucket + 1]) for end in ends))

    def _bucket(self, block: _Block) -> Int64:
        """Bucket of each document: int64 [documents of the block], ascending with the hash."""
        numbers = np.arange(block.first, block.first + len(block.tokens) - 1)
        top = hash_numbers(self._seed, numbers) >> np.uint64(32)
        return (top * np.uint64(self._buckets) >> np.uint64(32)).astype(np.int64)

    def _count(self) -> tuple[Int64, Int64, Int64]:
        """Where the documents, sequences and tokens of each bucket begin and the last one's end: int64 [buckets + 1] each."""
        counts = np.zeros((3, self._buckets + 1), np.int64)
        for block in self._reader.blocks():
            bucket = self._bucket(block) + 1
            for row, sizes in zip(counts, (None, np.diff(block.sequences), np.diff(block.tokens)), strict=True):
                row += np.bincount(bucket, sizes, self._buckets + 1).astype(np.int64)  # float64, exact below 2^53
        documents, sequences, tokens = np.cumsum(counts, axis=1)
        return documents, sequences, tokens

    def _scatter(self, begins: tuple[Int64, Int64, Int64]) -> None:
        """Copy each document to the next free place of its bucket."""
        reader, files = self._reader, self._files
        at_document, at_sequence, at_token = (begin[:-1].copy() for begin in begins)
        for block in reader.blocks():
            bucket = self._bucket(block)
            by_bucket = np.argsort(bucket, kind="stable")
            runs = np.flatnonzero(np.diff(bucket[by_bucket], prepend=-1, append=self._buckets))
            tokens = _read(reader.bin, block.tokens, files.dtype.itemsize)
            roles = None if reader.roles is None else _read(reader.roles, block.tokens, 1)
            lengths = _read(reader.idx, block.sequences, 4, HEADER.size)
            entries = np.empty(len(bucket), ENTRY)
            entries["number"] = np.arange(block.first, block.first + len(bucket))
            entries["sequences"], entries["tokens"] = np.diff(block.sequences), np.diff(block.tokens)
            for start, end in zip(runs[:-1].tolist(), runs[1:].tolist(), strict=True):
                chosen = by_bucket[start:end]
                here = int(bucket[chosen[0]])
                _write(files.bin, int(at_token[here]) * files.dtype.itemsize, _pick(tokens, chosen))
                if files.roles is not None and roles is not None:
                    _write(files.roles, int(at_token[here]), _pick(roles, chosen))
                _write(files.idx, HEADER.size + 4 * int(at_sequence[here]), _pick(lengths, chosen))
                _write(self._order, ENTRY.itemsize * int(at_document[here]), entries[chosen].tobytes())
                at_document[here] += len(chosen)
                at_sequence[here] += int(entries["sequences"][chosen].sum())
                at_token[here] += int(entries["tokens"][chosen].sum())
            self._bar.update(len(bucket))

    def _sort(self, document: int, sequence: int, token: int, document_end: int, sequence_end: int, token_end: int) -> None:
        """Order one bucket, which lies between these documents, sequences and tokens, by hash."""
        if document == document_end:
            return
        self._order.seek(ENTRY.itemsize * document)
        entries = np.frombuffer(self._order.read(ENTRY.itemsize * (document_end - document)), ENTRY)
        order = np.argsort(hash_numbers(self._seed, entries["number"]))  # a bijection: no two are equal
        sequences = sequence + np.concatenate(([0], np.cumsum(entries["sequences"])))
        tokens = token + np.concatenate(([0], np.cumsum(entries["tokens"])))
        assert (sequences[-1], tokens[-1]) == (sequence_end, token_end)
        for file, ends, width, head in (
            (self._files.bin, tokens, self._files.dtype.itemsize, 0),
            (self._files.roles, tokens, 1, 0),
            (self._files.idx, sequences, 4, HEADER.size),
        ):
            if file is not None:
                _write(file, head + int(ends[0]) * width, _pick(_read(file, ends, width, head), order))
        _write(self._order, ENTRY.itemsize * document, entries[order].tobytes())
        self._bar.update(len(entries))


@dataclasses.dataclass
class _Stretch:
    """Items of consecutive documents, and where in them each document begins, with the end: int64 [documents + 1]."""

    items: npt.NDArray[Any]
    begins: Int64


def _read(file: IO[bytes], begins: Int64, width: int, head: int = 0) -> _Stretch:
    """Documents that begin at these items of `width` bytes, after a head."""
    file.seek(head + int(begins[0]) * width)
    content = file.read(int(begins[-1] - begins[0]) * width)
    return _Stretch(np.frombuffer(content, f"u{width}"), begins - begins[0])


def _pick(stretch: _Stretch, chosen: Int64) -> bytes:
    """The bytes of these documents back to back."""
    starts, ends = stretch.begins[chosen], stretch.begins[chosen + 1]
    sizes = ends - starts
    total = int(sizes.sum())
    if total > COPIED_ITEMS * len(chosen):
        view = stretch.items.data
        return b"".join([view[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)])
    places = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    places += np.arange(total)
    return stretch.items[places].tobytes()


def _write(file: IO[bytes], at: int, content: bytes) -> None:
    file.seek(at)
    file.write(content)


def _document_indices(order: IO[bytes], documents: int) -> Iterator[Int64]:
    """First sequence of each document in its new place, then the number of sequences, in blocks."""
    yield np.zeros(1, np.int64)
    order.seek(0)
    end, step = 0, BLOCK_BYTES // DOCUMENT_BYTES
    for first in range(0, documents, step):
        entries = np.frombuffer(order.read(ENTRY.itemsize * min(step, documents - first)), ENTRY)
        ends = end + np.cumsum(entries["sequences"])
        yield ends
        end = int(ends[-1])
