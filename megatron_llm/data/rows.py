"""Rows of one source: what row number n of a pretraining, chat or synthetic data set is.

Each class is an endless pure function `row(n) -> Row`; n // rows_per_epoch is the epoch. Nothing is kept between calls
but caches, so ranks agree without talking and a resumed run needs only the number of rows consumed. `stream.py`
blends sources and turns rows into `Batch`es.

S is `training.sequence_length`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import NOT_TRAINED, ROLE_MASK, ROLES, IndexedDataset
from megatron_llm.data.order import permutation
from megatron_llm.data.packing import Method, Packing, pack

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """S tokens: ids and the ids they predict (int64 [S]), loss weights (float32 [S]), and where segments start.

    `starts` is int64, ascending, its first entry is 0. `roles`: who speaks each label (`ROLES`, uint8 [S]), in chat data.
    """

    tokens: IntArray
    labels: IntArray
    weights: npt.NDArray[np.float32]
    starts: IntArray
    roles: npt.NDArray[np.uint8] | None = None


class RowSource(Protocol):
    """A source of rows. `summary` says in a phrase what it holds, with anything dropped or cut."""

    @property
    def rows_per_epoch(self) -> int: ...

    @property
    def summary(self) -> str: ...

    def row(self, number: int) -> Row: ...


class PretrainRows:
    """Windows of the token stream: row i of an epoch takes S tokens and, as labels, the S tokens one further.

    Windows follow each other without gap, so all windows of an epoch predict rows_per_epoch * S different tokens.
    The (N - 1) mod S tokens that do not fill a window at the end are not lost: each epoch moves all windows by another offset in
    [0, S), reading the stream as a ring, so that other tokens are left over and documents are cut elsewhere.
    """

    def __init__(self, dataset: IndexedDataset, sequence_length: int, seed: int, shuffled: bool, isolation: bool, masked: bool):
        """`isolation`: documents are segments of their own. `masked`: no document's end learns to predict the next one's start.

        Raises ValueError if the data set is shorter than one row.
        """
        self._dataset, self._length, self._seed = dataset, sequence_length, seed
        self._shuffled, self._isolation, self._masked = shuffled, isolation, masked
        self._total = len(dataset.tokens)
        self.rows_per_epoch = (self._total - 1) // sequence_length
        if self.rows_per_epoch < 1:
            raise ValueError(
                f"{dataset.prefix} has {self._total} tokens, but one row takes {sequence_length + 1} "
                f"(training.sequence_length + 1); use shorter rows or more data"
            )

    @property
    def summary(self) -> str:
        return f"{self._dataset.documents:,} documents, {self._total:,} tokens, {self.rows_per_epoch:,} rows an epoch"

    def row(self, number: int) -> Row:
        """Takes some tens of microseconds. Raises ValueError naming file and byte of an id outside the vocabulary."""
        epoch, index = divmod(number, self.rows_per_epoch)
        if self._shuffled:
            index = permutation(self.rows_per_epoch, self._seed, epoch)(index)
        start = (self._offset(epoch) + index * self._length) % self._total
        window = self._window(start, self._length + 1)
        weights = np.ones(self._length, np.float32)
        starts = np.zeros(1, np.int64)
        if self._isolation or self._masked:
            inside = self._boundaries(start, start + self._length + 1) - start
            if self._masked:
                weights[inside - 1] = 0
            if self._isolation:
                starts = np.concatenate((starts, inside[inside < self._length]))
        return Row(window[:-1], window[1:], weights, starts)

    def _offset(self, epoch: int) -> int:
        """Offset of the windows: 0 in epoch 0, and every number below S once in S epochs."""
        offsets = permutation(self._length, self._seed, 0)
        return (offsets(epoch % self._length) - offsets(0)) % self._length if epoch else 0

    def _window(self, start: int, count: int) -> IntArray:
        """`count` tokens from `start` on, going on at token 0 after the last."""
        head = self._dataset.read(start, count)
        if len(head) == count:
            return head
        return np.concatenate((head, self._window(0, count - len(head))))

    def _boundaries(self, start: int, end: int) -> IntArray:
        """Document starts strictly between two places of the ring, counted from the ring's token 0 without wrapping."""
        if end <= self._total:
            return self._dataset.boundaries(start, end)
        around = self._boundaries(0, end - self._total) + self._total
        return np.concatenate((self._dataset.boundaries(start, self._total), [self._total], around))


@dataclass(frozen=True)
class Pieces:
    """What is packed: stretches of the token file that become segments of a row.

    Attributes:
        begins, lengths: int64 [n] token offset and int32 [n] number of tokens, 1 to S, of each piece.
        continued: bool [n], the document goes on after the piece, so the piece's last token predicts its next token.
        summary: a phrase about what they are; note: one about what was dropped or cut.
    """

    begins: IntArray
    lengths: npt.NDArray[np.int32]
    continued: npt.NDArray[np.bool_]
    summary: str
    note: str


class PackedRows:
    """Packed pieces of documents or conversations: each is a segment of its own, and none predicts another's token.

    Every piece is in exactly one row of an epoch. What is left of a row is a segment of weight 0. A process holds 21 bytes
    a piece, 29 from the second epoch of shuffled best-fit on. Making the pieces takes about 80 bytes each for a moment, and
    packing some 50 for each of at most 2^24 pieces at a time.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        pieces: Pieces,
        sequence_length: int,
        seed: int,
        shuffled: bool,
        packing: Method,
        trained: Callable[[int, int], npt.NDArray[Any]],
    ):
        """`trained(begin, end)`: weights of the predictions of tokens begin to end of the file, [end - begin]."""
        self._dataset, self._pieces, self._length, self._seed = dataset, pieces, sequence_length, seed
        self._shuffled, self._method, self._trained = shuffled, packing, trained
        self._packings: dict[int, Packing] = {}

    @property
    def rows_per_epoch(self) -> int:
        return self._packing(0).rows

    @property
    def summary(self) -> str:
        used = float(self._pieces.lengths.sum(dtype=np.int64)) / (self.rows_per_epoch * self._length)
        return f"{self._pieces.summary} in {self.rows_per_epoch:,} rows an epoch ({used:.2%} full){self._pieces.note}"

    def _packing(self, epoch: int) -> Packing:
        """Cached: a batch at the turn of an epoch needs two of them."""
        epoch = epoch if self._method == "best_fit" and self._shuffled else 0
        if epoch not in self._packings:
            while len(self._packings) > 1:
                del self._packings[next(iter(self._packings))]
            self._packings[epoch] = pack(self._pieces.lengths, self._length, self._method, self._seed, epoch)
        return self._packings[epoch]

    def row(self, number: int) -> Row:
        """Raises ValueError naming file and byte of an id outside the vocabulary."""
        epoch, index = divmod(number, self.rows_per_epoch)
        if self._shuffled:
            index = permutation(self.rows_per_epoch, self._seed, epoch)(index)
        tokens = np.zeros(self._length, np.int64)
        labels = np.zeros(self._length, np.int64)
        weights = np.zeros(self._length, np.float32)
        roles = None if self._dataset.roles is None else np.zeros(self._length, np.uint8)
        starts, at = [], 0
        items = self._packing(epoch).row(index)
        begins, lengths, continued = self._pieces.begins[items], self._pieces.lengths[items], self._pieces.continued[items]
        for begin, count, more in zip(begins.tolist(), lengths.tolist(), continued.tolist(), strict=True):
            ids = self._dataset.read(begin, count + more)
            tokens[at : at + count] = ids[:count]
            predictions = slice(at, at + len(ids) - 1)
            labels[predictions] = ids[1:]
            weights[predictions] = self._trained(begin + 1, begin + len(ids))
            if roles is not None and self._dataset.roles is not None:
                roles[predictions] = self._dataset.roles[begin + 1 : begin + len(ids)] & ROLE_MASK
            starts.append(at)
            at += count
        if at < self._length:
            starts.append(at)
        return Row(tokens, labels, weights, np.asarray(starts, np.int64), roles)


def document_rows(dataset: IndexedDataset, sequence_length: int, seed: int, shuffled: bool) -> PackedRows:
    """Best-fit packing of pretraining documents (Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024).

    Only a document longer than a row is cut: into full rows and a rest. Unlike `PretrainRows`, which needs no memory for a
    document, this holds an index of all pieces (see `PackedRows`): for up to some hundred million documents.
    Raises ValueError for a data set without tokens.
    """
    pieces = _document_pieces(dataset, sequence_length)
    return PackedRows(dataset, pieces, sequence_length, seed, shuffled, "best_fit", _all_tokens)


def _document_pieces(dataset: IndexedDataset, sequence_length: int) -> Pieces:
    offsets = dataset.document_offsets()
    lengths = np.diff(offsets)
    counts = -(-lengths // sequence_length)  # pieces of each document; none of an empty one
    ends = np.cumsum(counts)
    if not len(ends) or not ends[-1]:
        raise ValueError(f"{dataset.prefix} has no tokens; preprocess again")
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(ends[-1]) - (ends - counts)[document]  # of the piece within its document
    begins = offsets[document] + number * sequence_length
    left = offsets[document + 1] - begins
    cut = int((counts > 1).sum())
    crossing = (offsets[:-1] // sequence_length != (offsets[1:] - 1) // sequence_length) & (lengths > 0)
    return Pieces(
        begins,
        np.minimum(left, sequence_length).astype(np.int32),
        left > sequence_length,
        f"{dataset.documents:,} documents, {len(dataset.tokens):,} tokens,",
        f", {cut:,} documents cut (packing concat cuts {int(crossing.sum()):,})",
    )


def chat_rows(
    dataset: IndexedDataset,
    sequence_length: int,
    seed: int,
    shuffled: bool,
    packing: Method,
    train_on: Literal["assistant", "all"],
    overlong: Literal["error", "drop", "truncate"],
) -> PackedRows:
    """Packed conversations, never cut, unless the user asks for `overlong: truncate`.

    Raises ValueError without role bytes, for a record longer than S if `overlong` is "error", or if none is left.
    """
    if dataset.roles is None:
        raise ValueError(
            f"{dataset.prefix}.roles.bin does not exist, so nobody knows which tokens to train; "
            f"make chat data with `megatron-llm preprocess-chat`, or set data.kind: pretrain"
        )
    roles = dataset.roles

    def replies(begin: int, end: int) -> npt.NDArray[np.bool_]:
        return (roles[begin:end] & (ROLE_MASK | NOT_TRAINED)) == ROLES["assistant"]

    pieces = _conversation_pieces(dataset, sequence_length, overlong)
    trained = _all_tokens if train_on == "all" else replies
    return PackedRows(dataset, pieces, sequence_length, seed, shuffled, packing, trained)


def _conversation_pieces(dataset: IndexedDataset, sequence_length: int, overlong: str) -> Pieces:
    offsets = dataset.document_offsets()
    lengths = np.diff(offsets)
    too_long = lengths > sequence_length
    count = int(too_long.sum())
    if count and overlong == "error":
        first = int(np.argmax(too_long))
        raise ValueError(
            f"{dataset.prefix}: record {first} (counted from 0) has {lengths[first]} tokens, more than "
            f"training.sequence_length {sequence_length}; {count} of {len(lengths)} records are too long, "
            f"the longest has {lengths.max()}. Raise training.sequence_length, or set data.overlong to drop or truncate"
        )
    keep = (lengths > 0) & ~(too_long & (overlong == "drop"))
    kept = int(keep.sum())
    if not kept:
        raise ValueError(
            f"{dataset.prefix} has no conversation of 1 to training.sequence_length {sequence_length} tokens "
            f"({count} of {len(lengths)} are longer and data.overlong is {overlong})"
        )
    done = {"drop": "dropped", "truncate": "cut"}.get(overlong)
    return Pieces(
        offsets[:-1][keep],
        np.minimum(lengths[keep], sequence_length).astype(np.int32),
        np.zeros(kept, bool),  # what is cut off is not predicted either
        f"{kept:,} conversations",
        f", {count:,} longer than {sequence_length} tokens {done}" if count else "",
    )


def _all_tokens(begin: int, end: int) -> npt.NDArray[Any]:
    return np.ones(end - begin, bool)


class SyntheticRows:
    """Random tokens, a pure function of (seed, row): benchmarks and tests need no files.

    1 to 4 documents of uneven length a row, and a quarter of the positions weigh 0, so that micro-batches hold different
    numbers of loss tokens.
    """

    def __init__(self, vocab_size: int, sequence_length: int, seed: int, isolation: bool, rows_per_epoch: int):
        self._vocab_size, self._length, self._seed, self._isolation = vocab_size, sequence_length, seed, isolation
        self.rows_per_epoch = rows_per_epoch

    @property
    def summary(self) -> str:
        return f"random tokens of seed {self._seed}"

    def row(self, number: int) -> Row:
        # Raw bits, because numpy promises their stability across versions and not that of Generator's methods.
        bits = np.random.Philox(key=np.array([self._seed, number], np.uint64)).random_raw(2 * self._length + 4)
        tokens = (bits[: self._length] % np.uint64(self._vocab_size)).astype(np.int64)
        weights = (bits[self._length : 2 * self._length] % np.uint64(4) != 0).astype(np.float32)
        cuts = bits[2 * self._length :]
        documents = 1 + int(cuts[0] % np.uint64(4))
        starts = np.unique(np.append(0, (cuts[1:documents] % np.uint64(self._length)).astype(np.int64)))
        weights[np.append(starts[1:], self._length) - 1] = 0
        return Row(tokens, np.append(tokens[1:], 0), weights, starts if self._isolation else starts[:1])
