"""Megatron's row order, for a run that moves here: what `GPTDataset` and `BlendedDataset` of megatron-core give as row n.

Checked row by row against megatron-core 0.16.1, whose rules are these. The sequences of the training split are written one
after the other for as many epochs as the run takes, and shuffled (`document_index`); sample k is tokens kS to kS + S of that
stream (`sample_index` says where it starts); the samples are shuffled too (`shuffle_index`). If less than 0.80 of the last
epoch is used, both shuffles keep it apart. So the order depends on how many samples the run takes in all, which must not
change during a run, and unlike `order.py` and `blend.py` it takes an index: memory and start-up grow with the data. Every
process has its own: 4 bytes a sequence and epoch, 12 bytes a sample (16 beyond 2^31 sequences times epochs), 2 bytes a row
of a blend. Called by `stream.py` for `data.order: megatron`.

S is `training.sequence_length`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import BLOCK, IndexedDataset
from megatron_llm.data.rows import Row

try:  # the C++ extension is optional: same result, some hundred times the speed
    from megatron_llm._native import greedy_blend as _native_greedy_blend
except ImportError:
    _native_greedy_blend = None

FINAL_EPOCH_SHARE = 0.80  # an epoch of which less than this is used is shuffled apart
SURPLUS = 0.005  # a blended source is built with so many more samples than its share
BLEND_BLOCK = 1 << 12  # rows of a blend between two stored counts

FloatArray = npt.NDArray[np.float64]


class _Index(NamedTuple):
    """`order`: sequence numbers of all epochs, shuffled. `places`, `offsets` [samples + 1]: where in `order`, and where in
    that sequence, each sample starts and the last one ends. `shuffle`: the sample of each row."""

    order: npt.NDArray[np.int32]
    places: npt.NDArray[Any]
    offsets: npt.NDArray[np.int32]
    shuffle: npt.NDArray[Any]


class MegatronRows:
    """Row n is sample n of the training split of a `GPTDataset` that was asked for `samples` samples.

    Attributes:
        samples: rows there are: those asked for, and what is left of the last epoch.
        epochs: how often the split is read. rows_per_epoch: full rows in one reading of it, at least 1.
    """

    def __init__(
        self, dataset: IndexedDataset, sequence_length: int, seed: int, samples: int, split: str, isolation: bool, masked: bool
    ):
        """`split`: shares of training, validation and test, such as "969,30,1". `isolation`, `masked`: as in `PretrainRows`,
        where a segment is a sequence of the file or the piece of it that lies in the row. The index is built for the first row.

        Raises ValueError for a malformed split, and if the training split has no tokens.
        """
        assert samples > 0
        self._dataset, self._length, self._seed = dataset, sequence_length, seed
        self._isolation, self._masked = isolation, masked
        self._lengths, self._pointers = dataset.sequence_lengths, dataset.sequence_pointers
        self._sequences = _training_sequences(split, len(self._lengths), dataset.prefix)
        tokens = int(self._lengths[: self._sequences].sum(dtype=np.int64))
        if tokens <= 0:
            raise ValueError(
                f"{dataset.prefix}: the training part of data.megatron_split {split!r} is the first {self._sequences} of "
                f"{len(self._lengths)} sequences, which have no tokens; give it a larger share or more data"
            )
        self.epochs = -(-(samples * sequence_length + 1) // tokens)
        self.samples = (self.epochs * tokens - 1) // sequence_length
        in_epoch = (tokens - 1) // sequence_length
        self.rows_per_epoch = max(1, in_epoch)
        self._before_last = ((self.epochs - 1) * tokens - 1) // sequence_length  # samples of all epochs but the last
        self._last_apart = self.epochs > 1 and samples - self._before_last < int(FINAL_EPOCH_SHARE * in_epoch)

    @property
    def summary(self) -> str:
        apart = ", the last one shuffled apart" if self._last_apart else ""
        return f"{self.samples:,} rows in Megatron's order from {self.epochs:,} epochs{apart}"

    @functools.cached_property
    def _index(self) -> _Index:
        """Raises ValueError if the data set's index is damaged."""
        self._dataset.verify()
        random = np.random.RandomState(self._seed)
        order = np.tile(np.arange(self._sequences, dtype=np.int32), self.epochs)
        _shuffle_parts(random, order, self._sequences * (self.epochs - 1) if self._last_apart else len(order))
        places, offsets = self._sample_starts(order)
        shuffle = np.arange(self.samples, dtype=np.uint32 if self.samples < 1 << 32 else np.int64)
        _shuffle_parts(random, shuffle, self._before_last if self._last_apart else self.samples)
        return _Index(order, places, offsets, shuffle)

    def _sample_starts(self, order: npt.NDArray[np.int32]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        places = np.empty(self.samples + 1, np.int32 if len(order) < 1 << 31 else np.int64)
        offsets = np.empty(self.samples + 1, np.int32)
        aligned = self._lengths[: self._sequences].copy()  # in the file they are not, which makes gathering slow
        start = 0  # tokens before the block
        for first in range(0, len(order), BLOCK):
            lengths = aligned[order[first : first + BLOCK]]
            ends = start + np.cumsum(lengths, dtype=np.int64)
            samples = slice(-(-start // self._length), min(-(-int(ends[-1]) // self._length), self.samples + 1))
            tokens = np.arange(samples.start, samples.stop) * self._length
            inside = np.searchsorted(ends, tokens, side="right")  # skips empty sequences
            places[samples] = first + inside
            offsets[samples] = tokens - ends[inside] + lengths[inside]
            start = int(ends[-1])
        return places, offsets

    def row(self, number: int) -> Row:
        """Raises ValueError outside [0, samples), and for ids that the model does not have."""
        if not 0 <= number < self.samples:
            raise ValueError(
                f"row {number} of {self._dataset.prefix}: Megatron's order was made for {self.samples} rows "
                f"and cannot be prolonged; set training.steps to the length of the whole run"
            )
        index, size = self._index, self._dataset.dtype.itemsize
        sample = int(index.shuffle[number])
        sequences = index.order[index.places[sample] : int(index.places[sample + 1]) + 1]
        counts = self._lengths[sequences].astype(np.int64)
        begins = self._pointers[sequences] // size
        counts[-1] = index.offsets[sample + 1] + 1
        counts[0] -= index.offsets[sample]
        begins[0] += index.offsets[sample]
        pieces = zip(begins.tolist(), counts.tolist(), strict=True)
        window = np.concatenate([self._dataset.read(begin, count) for begin, count in pieces])
        weights = np.ones(self._length, np.float32)
        starts = np.zeros(1, np.int64)
        inside = np.unique(np.cumsum(counts[:-1]))  # an empty sequence starts where the next one does
        if self._masked:
            weights[inside - 1] = 0
        if self._isolation:
            starts = np.concatenate((starts, inside[inside < self._length]))
        return Row(window[:-1], window[1:], weights, starts)


class MegatronBlend:
    """Deals `size` rows to sources as `BlendedDataset` does: each row to the source that is furthest behind its share.

    Attributes:
        counts: rows of each source. period: `size`; there are no more rows than that.
    """

    def __init__(self, weights: Sequence[float], size: int):
        """`weights`: positive, any scale. Raises ValueError beyond 32,766 sources, Megatron's limit."""
        if len(weights) > 32766:
            raise ValueError(f"{len(weights)} sources; Megatron's order has at most 32766: merge some")
        # Twice, as Megatron does: the second time moves some last bits, and with them ties.
        self._sources = greedy_blend(_normalize(_normalize(weights)), size)
        self.counts = np.bincount(self._sources, minlength=len(weights)).tolist()
        self.period = size
        blocks = range(0, size, BLEND_BLOCK)
        per_block = [np.bincount(self._sources[at : at + BLEND_BLOCK], minlength=len(weights)) for at in blocks]
        self._before = np.cumsum([np.zeros(len(weights), np.int64), *per_block], axis=0)

    def __call__(self, row: int) -> tuple[int, int]:
        """(source, number of the row within that source) of a row of the blend. Raises ValueError outside [0, size)."""
        if not 0 <= row < self.period:
            raise ValueError(f"row {row} of a blend in Megatron's order that was made for {self.period} rows")
        source, block = int(self._sources[row]), row // BLEND_BLOCK
        in_block = int(np.count_nonzero(self._sources[block * BLEND_BLOCK : row] == source))
        return source, int(self._before[block, source]) + in_block


def source_samples(weights: Sequence[float], size: int) -> list[int]:
    """Samples that each source of a blend is built with, which is Megatron's margin above its share of `size` rows."""
    return [math.ceil(math.ceil(size * share) * (1 + SURPLUS)) for share in _normalize(weights).tolist()]


def greedy_blend(weights: FloatArray, size: int) -> npt.NDArray[np.int16]:
    """Source of each of `size` rows; `weights` sum to 1. In C++ where the extension is built."""
    if _native_greedy_blend is not None:
        sources: npt.NDArray[np.int16] = _native_greedy_blend(weights, size)
        return sources
    return greedy_blend_reference(weights, size)


def greedy_blend_reference(weights: FloatArray, size: int) -> npt.NDArray[np.int16]:
    """What csrc/blending.cpp computes: the source with the largest weight * max(row, 1) - rows so far, the first of equals."""
    counts = np.zeros(len(weights))
    sources = np.empty(size, np.int16)
    for row in range(size):
        source = int(np.argmax(weights * float(max(row, 1)) - counts))
        counts[source] += 1
        sources[row] = source
    return sources


def _normalize(weights: Sequence[float] | FloatArray) -> FloatArray:
    values = np.asarray(weights, np.float64)
    return values / values.sum()


def _training_sequences(split: str, sequences: int, prefix: str) -> int:
    """How many of the file's sequences are the training split; it is always the first ones. Raises ValueError."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) == 0:
        raise ValueError(
            f"data.megatron_split: {split!r} is not one to three shares (training, validation, test) such as 969,30,1"
        )
    if sequences >= 1 << 31:
        raise ValueError(f"{prefix} has {sequences} sequences; Megatron's order counts to 2^31: use data.order: shuffled")
    # Padded with zeros as Megatron does: the order of a sum decides its last bit.
    return round(float(_normalize([*shares, 0.0, 0.0][:3])[0]) * sequences)


def _shuffle_parts(random: np.random.RandomState, numbers: npt.NDArray[Any], cut: int) -> None:
    """Shuffle numbers[:cut] and then numbers[cut:], in place."""
    random.shuffle(numbers[:cut])
    random.shuffle(numbers[cut:])
