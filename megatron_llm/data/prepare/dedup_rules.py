"""What counts as a duplicate, and which document of a group stays: pure functions on texts and numpy arrays.

`dedup_steps.py` calls them from datatrove's pipeline steps; `dedup.py` asks for the number of hashes.

A document is named by its *position*, one uint64 that sorts in input order: the index of its file, then the number of its
record (line or row, from 1). Legend: N documents; M removed ones.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.uint64]
Number = TypeVar("Number", bound=np.generic)

RECORD_BITS = 40  # a file may hold 1.1e12 records, and there may be 16.7 million files
MAX_HASHES = 128  # of one signature; the time and space that MinHash takes grow with it
FOUND = 0.9  # chance that two documents of exactly the similarity asked for share a bucket

_NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d+)*")
_LETTERS = re.compile(r"[^\W\d_]+")


def position(file: int, records: npt.ArrayLike) -> Array:
    """Positions of records (numbered from 1) of the file with index `file`."""
    return np.asarray(records, np.uint64) | np.uint64(file << RECORD_BITS)


def file_and_record(position: int) -> tuple[int, int]:
    """The index of the file and the number of the record of a position."""
    return position >> RECORD_BITS, position & ((1 << RECORD_BITS) - 1)


def contains(sorted_M: Array, values_N: Array) -> npt.NDArray[np.bool_]:
    """Which of the values are among the sorted ones: bool [N]."""
    return np.searchsorted(sorted_M, values_N, "right") > np.searchsorted(sorted_M, values_N, "left")


def text_digest(text: str) -> bytes:
    """16 bytes that stand for the exact text: two of 1e9 different ones agree with a probability of 1.5e-21."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def words_and_numbers(text: str) -> tuple[int, int]:
    """Two 64-bit keys of a text: of its words and of its numbers, each in their order.

    Case, punctuation and white space do not count, as they do not for MinHash. Two texts with the same words but other
    numbers (`3.10`, `-2`, `1,000`; digits of any script) are said to differ in numbers only.
    """
    numbers = " ".join(_NUMBER.findall(text))
    words = " ".join(_LETTERS.findall(_NUMBER.sub(" ", text.lower())))
    return _key(words), _key(numbers)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def exact_duplicates(digests_N2: Array, positions_N: Array) -> tuple[Array, Array]:
    """Positions of the documents that repeat an earlier one, and of the first of each: two arrays [M], sorted by the first."""
    order = np.lexsort((positions_N, digests_N2[:, 1], digests_N2[:, 0]))
    digests_N2, positions_N = digests_N2[order], positions_N[order]
    new_N = np.ones(len(order), bool)
    new_N[1:] = (digests_N2[1:] != digests_N2[:-1]).any(1)
    removed, kept = positions_N[~new_N], _first_of_run(positions_N, new_N)[~new_N]
    order = np.argsort(removed)
    return removed[order], kept[order]


def near_duplicates(
    positions_N: Array, lengths_N: Array, clusters_N: Array, words_N: Array, numbers_N: Array
) -> tuple[Array, Array]:
    """Positions of the members of clusters that go, and of the one that stays for each: two arrays [M], sorted by the first.

    Of every group the longest document stays, the first in input order among equally long ones. A cluster is one group,
    unless some of its documents differ in numbers only (see `words_and_numbers`). These *variants* are grouped by their
    numbers, so that no two documents that differ in numbers only are ever in one group; the documents of the cluster that
    are no variants of another one join the group of the cluster's longest document.
    """
    order = np.lexsort((numbers_N, words_N, clusters_N))
    cluster_words_new = _changes(clusters_N[order], words_N[order])
    run = np.cumsum(cluster_words_new) - 1
    numbers_differ = _changes(clusters_N[order], words_N[order], numbers_N[order]) & ~cluster_words_new
    variant_N = np.empty(len(order), bool)
    variant_N[order] = (np.bincount(run, numbers_differ) > 0)[run]

    order = np.lexsort((positions_N, -lengths_N.astype(np.int64), clusters_N))
    longest_N = np.empty(len(order), np.int64)
    longest_N[order] = _first_of_run(order, _changes(clusters_N[order]))
    decides_N = np.where(variant_N, np.arange(len(order)), longest_N)  # the document whose group this one is in
    by_numbers_N, numbers_N = variant_N[decides_N], np.where(variant_N[decides_N], numbers_N[decides_N], 0)

    order = np.lexsort((positions_N, -lengths_N.astype(np.int64), numbers_N, by_numbers_N, clusters_N))
    new = _changes(clusters_N[order], by_numbers_N[order], numbers_N[order])
    removed, kept = positions_N[order][~new], _first_of_run(positions_N[order], new)[~new]
    order = np.argsort(removed)
    return removed[order], kept[order]


def _changes(*columns: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """True where a row of sorted columns differs from the one before; the first row does."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return new


def _first_of_run(values_N: npt.NDArray[Number], new_N: npt.NDArray[np.bool_]) -> npt.NDArray[Number]:
    """For each element the first one of its run; a run starts where `new_N` is True."""
    return values_N[np.maximum.accumulate(np.where(new_N, np.arange(len(values_N)), 0))]


@dataclass(frozen=True)
class Signature:
    """Shape of a MinHash signature: two documents meet if all hashes of at least one bucket agree."""

    buckets: int
    hashes: int  # per bucket

    def found(self, similarity: float) -> float:
        """Chance that two documents with this Jaccard similarity of their word n-grams meet."""
        return 1 - (1 - similarity**self.hashes) ** self.buckets

    @property
    def threshold(self) -> float:
        """The usual estimate of the similarity at which the chance rises most steeply."""
        return float((1 / self.buckets) ** (1 / self.hashes))


def signature_for(similarity: float) -> Signature:
    """The steepest signature of at most MAX_HASHES hashes that finds pairs of this similarity with a chance of FOUND.

    The more hashes a bucket has, the steeper is the curve, and the more buckets it takes to keep the chance (Leskovec,
    Rajaraman, Ullman, Mining of Massive Datasets, section 3.4). Raises ValueError for a similarity outside (0, 1).
    """
    if not 0 < similarity < 1:
        raise ValueError(f"a similarity of {similarity} is not between 0 and 1 (1 would be --no-near)")
    best = None
    for hashes in range(1, MAX_HASHES + 1):
        buckets = math.ceil(math.log(1 - FOUND) / math.log1p(-(similarity**hashes)))
        if buckets * hashes > MAX_HASHES:
            break  # both grow
        best = Signature(buckets, hashes)
    if best is None:
        raise ValueError(f"a similarity of {similarity} takes more than {MAX_HASHES} hashes; ask for 0.02 or more")
    return best
