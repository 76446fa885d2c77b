"""Rows of one source: what row number n of a pretraining, packed or synthetic data set is.

Each class is an endless pure function `row(n) -> Row`; n // rows_per_epoch is the epoch. Nothing is kept between calls
but caches, so ranks agree without talking and a resumed run needs only the number of rows consumed. `chat_rows.py` says
what is packed of conversations; `stream.py` blends sources and turns rows into `Batch`es.

S is `training.sequence_length`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.order import permutation
from megatron_llm.data.packing import Method, Packing, pack

IntArray = npt.NDArray[np.int64]
Order = Literal["shuffled", "file", "short_to_long"]


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


class Piece(NamedTuple):
    """A segment of a row: `tokens` int64 [n], of which the first p predict `labels` int64 [p] with `weights` [p], p <= n, and the
    others nothing. `roles`: who speaks each label, uint8 [p], None where nobody is known to."""

    tokens: IntArray
    labels: IntArray
    weights: npt.NDArray[np.float32]
    roles: npt.NDArray[np.uint8] | None = None


class Pieces(Protocol):
    """What is packed: stretches of token files that become segments of a row, by number.

    Attributes:
        lengths: int32 [n] tokens of each, 1 to S.
        have_roles: whether they say who speaks.
        summary: a phrase about what they are; note: one about what was dropped or cut.
    """

    lengths: npt.NDArray[np.int32]
    have_roles: bool
    summary: str
    note: str

    def read(self, piece: int) -> Piece: ...


class PackedRows:
    """Packed pieces of documents or conversations: each is a segment of its own, and none predicts another's token.

    Every piece is in exactly one row of an epoch. What is left of a row is a segment of weight 0. Of the order `short_to_long`
    rows hold pieces of like length, and an epoch goes from the short ones to the long ones.

    Beside the pieces a process holds 8 bytes for each, 16 from the second epoch on where epochs differ. Packing takes some 50
    for each of at most 2^24 pieces at a time.
    """

    def __init__(self, pieces: Pieces, sequence_length: int, seed: int, order: Order, packing: Method):
        self._pieces, self._length, self._seed = pieces, sequence_length, seed
        self._order, self._method = order, packing
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
        rising = self._order == "short_to_long"
        epoch = epoch if rising or (self._method == "best_fit" and self._order == "shuffled") else 0
        if epoch not in self._packings:
            while len(self._packings) > 1:
                del self._packings[next(iter(self._packings))]
            self._packings[epoch] = pack(self._pieces.lengths, self._length, self._method, self._seed, epoch, rising=rising)
        return self._packings[epoch]

    def row(self, number: int) -> Row:
        """Raises ValueError naming file and byte of an id outside the vocabulary."""
        epoch, index = divmod(number, self.rows_per_epoch)
        if self._order == "shuffled":
            index = permutation(self.rows_per_epoch, self._seed, epoch)(index)
        tokens = np.zeros(self._length, np.int64)
        labels = np.zeros(self._length, np.int64)
        weights = np.zeros(self._length, np.float32)
        roles = np.zeros(self._length, np.uint8) if self._pieces.have_roles else None
        starts, at = [], 0
        for item in self._packing(epoch).row(index).tolist():
            piece = self._pieces.read(item)
            tokens[at : at + len(piece.tokens)] = piece.tokens
            predictions = slice(at, at + len(piece.labels))
            labels[predictions], weights[predictions] = piece.labels, piece.weights
            if roles is not None and piece.roles is not None:
                roles[predictions] = piece.roles
            starts.append(at)
            at += len(piece.tokens)
        if at < self._length:
            starts.append(at)
        return Row(tokens, labels, weights, np.asarray(starts, np.int64), roles)


def document_rows(dataset: IndexedDataset, sequence_length: int, seed: int, shuffled: bool) -> PackedRows:
    """Best-fit packing of pretraining documents (Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024).

    Only a document longer than a row is cut: into full rows and a rest. Unlike `PretrainRows`, which needs no memory for a
    document, this holds an index of all pieces (see `DocumentPieces`): for up to some hundred million documents.
    Raises ValueError for a data set without tokens.
    """
    pieces = DocumentPieces(dataset, sequence_length)
    return PackedRows(pieces, sequence_length, seed, "shuffled" if shuffled else "file", "best_fit")


class DocumentPieces:
    """Documents, those longer than S tokens cut. 13 bytes a piece; making them takes about 80 for a moment."""

    have_roles = False

    def __init__(self, dataset: IndexedDataset, sequence_length: int):
        """Raises ValueError for a data set without tokens."""
        offsets = dataset.document_offsets()
        lengths = np.diff(offsets)
        counts = -(-lengths // sequence_length)  # pieces of each document; none of an empty one
        ends = np.cumsum(counts)
        if not len(ends) or not ends[-1]:
            raise ValueError(f"{dataset.prefix} has no tokens; preprocess again")
        document = np.repeat(np.arange(len(lengths)), counts)
        number = np.arange(ends[-1]) - (ends - counts)[document]  # of the piece within its document
        self._dataset = dataset
        self._begins = offsets[document] + number * sequence_length
        left = offsets[document + 1] - self._begins
        self.lengths = np.minimum(left, sequence_length).astype(np.int32)
        self._continued = left > sequence_length  # the piece's last token predicts the document's next one
        cut = int((counts > 1).sum())
        crossing = (offsets[:-1] // sequence_length != (offsets[1:] - 1) // sequence_length) & (lengths > 0)
        self.summary = f"{dataset.documents:,} documents, {len(dataset.tokens):,} tokens,"
        self.note = f", {cut:,} documents cut (packing concat cuts {int(crossing.sum()):,})"

    def read(self, piece: int) -> Piece:
        count = int(self.lengths[piece])
        ids = self._dataset.read(int(self._begins[piece]), count + bool(self._continued[piece]))
        return Piece(ids[:count], ids[1:], np.ones(len(ids) - 1, np.float32))


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
