"""The pipeline steps of deduplication, run by datatrove's executors beside datatrove's own MinHash steps.

`dedup.py` strings them together and is the only importer: without datatrove this module cannot be imported. Records are read by
`inputs.py`, because datatrove's readers drop what they cannot read with no more than a line in a log, and rebuild records
instead of keeping them. A file is never split: task r of n reads the files r, r + n, ..., so that neither the result nor the
names of the output depend on the number of tasks.

Files of the work folder (positions as in `dedup_rules.py`):

    exact/texts/TASK.npy       [3, N]  two halves of the digests of the texts, positions
    exact/found/PART.npy       [2, M]  documents that repeat an earlier text, the first one with that text
    near/documents/TASK.npy    [4, N]  positions, lengths, words and numbers of what is left, in the order of MinHash's numbers
    near/signatures|pairs|clusters     datatrove's
    removed.npy                [3, M]  what goes, what stays for it, 1 if found as near duplicate; sorted
    largest.json, files/INDEX.json, files/INDEX.removed.jsonl, files/INDEX.skipped.jsonl
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from megatron_llm.data.prepare.chunks import Chunk, InputFile, chunk_texts
from megatron_llm.data.prepare.dedup_rules import (
    RECORD_BITS,
    Array,
    contains,
    exact_duplicates,
    near_duplicates,
    position,
    text_digest,
    words_and_numbers,
)
from megatron_llm.data.prepare.inputs import read_chunks

LARGEST = 10  # clusters shown in the report
MEMBERS = 3  # removed documents shown of each

Documents = Iterator[Document]


class Words(WhitespaceTokenizer):
    """Splits at spaces, and scripts that are written without spaces into characters.

    The text was simplified before: punctuation is white space. On such a text spaCy's English rules, datatrove's default, cut
    nearly the same words at a fortieth of the speed, and make one word of a Chinese sentence.
    """

    # Thai and Lao, Burmese, Khmer, kana, Han and its extensions
    _SCRIPTS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    _WORD = re.compile(rf"[{_SCRIPTS}]|[^\s{_SCRIPTS}]+")

    def word_tokenize(self, text: str) -> list[str]:
        return text.split() if text.isascii() else self._WORD.findall(text)


class Signatures(MinhashDedupSignature):
    """datatrove's signatures in bounded memory, and in files of their own."""

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        for path in Path(self.output_folder.path).glob(f"bucket_*/{rank:05d}.minhash.sig"):
            path.unlink()  # an interrupted task may hold it open and write its buffer late, between the new signatures
        super().run(data, rank, world_size)

    def get_signature(self, shingles: npt.NDArray[np.uint64]) -> list[list[int]]:
        # All hashes of all n-grams at once, as the base class makes them, are 9 GB for a text of 50 MB.
        pieces = [super(Signatures, self).get_signature(shingles[at : at + 65536]) for at in range(0, len(shingles), 65536)]
        return np.min(np.array(pieces, np.uint64), axis=0).tolist()


class ReadDocuments(PipelineStep):
    """The documents of the task's files; `id` is the position. What exact deduplication found in `without` is left out.

    Raises ValueError for the first bad record if `strict`; otherwise records without a text are left to `WriteKept` to report.
    """

    type, name = "READER", "records"

    def __init__(self, files: Sequence[InputFile], text_key: str, strict: bool, without: Path | None = None) -> None:
        super().__init__()
        self.files, self.text_key, self.strict, self.without = files, text_key, strict, without

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Documents:
        removed_M = self._removed(rank, world_size)
        for index in range(rank, len(self.files), world_size):
            for chunk in read_chunks([self.files[index]], columns=[self.text_key]):
                texts, indices, skipped = chunk_texts(chunk, self.text_key)
                if self.strict and (bad := next((record for record in skipped if record.bad), None)):
                    raise ValueError(f"{bad.where}: {bad.reason}")
                positions = positions_of(chunk, index, indices)
                for text, at, gone in zip(texts, positions.tolist(), contains(removed_M, positions).tolist(), strict=True):
                    if not gone:
                        yield Document(text=text, id=at)

    def _removed(self, rank: int, world_size: int) -> Array:
        """Sorted positions of what is left out of the task's files."""
        removed = [np.empty(0, np.uint64)]
        for path in sorted(self.without.glob("*.npy")) if self.without else ():
            positions_M = np.load(path, mmap_mode="r")[0]
            removed.append(positions_M[(positions_M >> RECORD_BITS) % world_size == rank])
        return np.sort(np.concatenate(removed))


class HashTexts(PipelineStep):
    """Writes exact/texts."""

    type, name = "DEDUP", "exact: digests"

    def __init__(self, texts: Path) -> None:
        super().__init__()
        self.texts = texts

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        digests, positions = bytearray(), array("Q")
        for document in data:
            digests += text_digest(document.text)
            positions.append(document.id)
        columns_3N = np.array([*np.frombuffer(digests, ">u8").reshape(-1, 2).T, positions], np.uint64)
        _save(self.texts / f"{rank:05d}.npy", columns_3N[:, np.argsort(columns_3N[0])])


class FindExact(PipelineStep):
    """Writes exact/found: task p of n takes the p-th part of the range of digests from all files, so memory is bounded."""

    type, name = "DEDUP", "exact: duplicates"

    def __init__(self, texts: Path, found: Path) -> None:
        super().__init__()
        self.texts, self.found = texts, found

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        low, high = ((part << 64) // world_size for part in (rank, rank + 1))
        parts = []
        for path in sorted(self.texts.glob("*.npy")):
            columns_3N = np.load(path, mmap_mode="r")
            first = np.searchsorted(columns_3N[0], np.uint64(low), "left")
            last = np.searchsorted(columns_3N[0], np.uint64(high - 1), "right")
            parts.append(np.array(columns_3N[:, first:last]))
        columns_3N = np.concatenate(parts, axis=1)
        _save(self.found / f"{rank:05d}.npy", np.array(exact_duplicates(columns_3N[:2].T, columns_3N[2])))


class DescribeDocuments(PipelineStep):
    """Writes near/documents and passes the documents on to the signatures, which number them in the same order."""

    type, name = "DEDUP", "near: lengths, words and numbers"

    def __init__(self, documents: Path) -> None:
        super().__init__()
        self.documents = documents

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        rows = array("Q")
        for document in data:
            rows.extend((document.id, len(document.text), *words_and_numbers(document.text)))
            yield document
        _save(self.documents / f"{rank:05d}.npy", np.array(rows, np.uint64).reshape(-1, 4).T)


class Decide(PipelineStep):
    """Writes removed.npy and largest.json from what both searches found. One task; memory grows with the duplicates only."""

    type, name = "DEDUP", "what goes"

    def __init__(self, work: Path, tasks: int, exact: bool, near: bool) -> None:
        super().__init__()
        self.work, self.tasks, self.exact, self.near = work, tasks, exact, near

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        nothing = np.empty((2, 0), np.uint64)
        found = [np.load(path) for path in sorted((self.work / "exact/found").glob("*.npy"))] if self.exact else []
        exact_2M = np.concatenate([nothing, *found], axis=1)
        near_2M = self._near() if self.near else nothing
        if near_2M.size:  # the first of equal texts may itself go as a near duplicate
            at = np.minimum(np.searchsorted(near_2M[0], exact_2M[1]), near_2M.shape[1] - 1)
            exact_2M[1] = np.where(near_2M[0, at] == exact_2M[1], near_2M[1, at], exact_2M[1])
        reasons_M = np.repeat(np.arange(2, dtype=np.uint64), [exact_2M.shape[1], near_2M.shape[1]])
        removed_3M = np.vstack([np.concatenate([exact_2M, near_2M], axis=1), reasons_M])
        removed_3M = removed_3M[:, np.argsort(removed_3M[0])]
        _save(self.work / "removed.npy", removed_3M)
        write_json(self.work / "largest.json", _clusters(removed_3M))

    def _near(self) -> Array:
        columns = []
        for rank in range(self.tasks):
            path = self.work / f"near/clusters/{rank:06d}.clusters"  # absent if no document of the task is in a cluster
            if path.exists():
                number, cluster = np.fromfile(path, "<u4").reshape(-1, 2).T
                documents_4N = np.load(self.work / f"near/documents/{rank:05d}.npy", mmap_mode="r")
                columns.append(np.vstack([documents_4N[:, number], cluster.astype(np.uint64)]))
        positions, lengths, words, numbers, clusters = np.concatenate([np.empty((5, 0), np.uint64), *columns], axis=1)
        return np.array(near_duplicates(positions, lengths, clusters, words, numbers))


def _clusters(removed_3M: Array) -> dict[str, Any]:
    """How many clusters there are of each size, and the largest: positions of what stays and of the first that go."""
    kept, counts = np.unique(removed_3M[1], return_counts=True)
    sizes = Counter((counts + 1).tolist())
    order = np.lexsort((kept, -counts))[:LARGEST]
    members = [removed_3M[0, removed_3M[1] == stays][:MEMBERS].tolist() for stays in kept[order]]
    largest = [
        {"size": size + 1, "kept": stays, "removed": removed}
        for size, stays, removed in zip(counts[order].tolist(), kept[order].tolist(), members, strict=True)
    ]
    return {"sizes": {str(size): sizes[size] for size in sorted(sizes)}, "largest": largest}


def positions_of(chunk: Chunk, index: int, indices: Sequence[int]) -> Array:
    """Positions of the records with these indices in a chunk of the file with this index."""
    return position(index, np.asarray(indices, np.int64) + chunk.first)


def of_file(columns: Array, index: int) -> Array:
    """The part of columns [K, M], sorted by the positions in row 0, that is of one file."""
    first, last = np.searchsorted(columns[0], [position(index, 0), position(index + 1, 0)])
    return np.array(columns[:, first:last])


def _save(path: Path, columns: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, columns)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is complete once it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    os.replace(partial, path)
