"""Conversations as pieces of rows: which of their tokens have loss, what becomes of over-long ones, and which are replaced.

All of it is decided when training starts, from role bytes (`indexed.py`), so nothing is tokenized again to train on something
else. Called by `stream.py`; `rows.PackedRows` packs the pieces.

The weight of a token is a function of its conversation as it is in the file, before anything is cut:

    0                      of a message that is not to be trained (bit 3), whatever else is set
    1 * message's weight   of a trained reply (`train_on` assistant: each, last_assistant: the last one, all: every token)
    p * message's weight   of all others, p = `prompt_loss_weight`

and is that of the prediction whose label the token is, so the first token of a segment has none.

S is `training.sequence_length`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import BLOCK, NOT_TRAINED, ROLE_MASK, ROLES, WEIGHT_SHIFT, IndexedDataset
from megatron_llm.data.order import hash64, hash_numbers
from megatron_llm.data.rows import IntArray, Piece
from megatron_llm.data.turns import head_length, last_reply, split_turns

Overlong = Literal["error", "drop", "truncate", "split_turns"]
Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Loss:
    """What is trained: see the module's docstring.

    Attributes:
        train_on, prompt_weight: `data.train_on`, `data.prompt_loss_weight`.
        by_message: whether messages have weights of their own; without, every one above 0 is 1.
    """

    train_on: Literal["assistant", "all", "last_assistant"] = "assistant"
    prompt_weight: float = 0.0
    by_message: bool = True


VALIDATION = Loss(by_message=False)
"""The replies, each token once: a loss that means the same whatever training does."""


class Variant(NamedTuple):
    """A data set whose document i is another form of conversation i, or empty, and the share of them that it replaces."""

    name: str
    dataset: IndexedDataset
    rate: float


class _Tables(NamedTuple):
    """Weights by role byte, float32 [256], nan for bytes that mean nothing: from the first trained reply on, and before."""

    trained: Weights
    before: Weights


class _Cut(NamedTuple):
    """Pieces in the order of the file: of which conversation, where they are, what they repeat before that.

    `heads` is the number of tokens from the start of the conversation that go before a piece; all are int64 [n].
    """

    documents: IntArray
    begins: IntArray
    bodies: IntArray
    heads: IntArray


class ConversationPieces:
    """Conversations, whole or cut, each token with its weight.

    A piece takes 12 bytes, and 12 more if conversations were split, 8 with `last_assistant`, 1 with variants. All role bytes
    are read once.
    """

    have_roles = True

    def __init__(
        self,
        dataset: IndexedDataset,
        sequence_length: int,
        loss: Loss,
        overlong: Overlong,
        variants: Sequence[Variant] = (),
        seed: int = 0,
    ):
        """`seed` chooses the conversations that variants replace.

        Raises ValueError without role bytes or for damaged ones, for a conversation longer than S if `overlong` is "error", or
        if no token with loss is left.
        """
        self._datasets = [dataset, *(variant.dataset for variant in variants)]
        self._tables = [_tables(each, loss) for each in self._datasets]
        files, begins, lengths, chosen = _choose(dataset, variants, seed)
        cut, notes = _cut(self._datasets, files, begins, lengths, sequence_length, overlong)
        replies = None
        if loss.train_on == "last_assistant":
            replies = self._last_replies(files, begins, lengths)[cut.documents]
        counts = self._count_trained(files[cut.documents], cut, replies)
        kept = counts > 0
        if not kept.any():
            raise ValueError(_nothing_left(dataset.prefix, sequence_length, loss, overlong, len(lengths), notes))

        self._begins, self.lengths = cut.begins[kept], (cut.bodies + cut.heads)[kept].astype(np.int32)
        self._files = files[cut.documents[kept]] if variants else None
        self._replies = None if replies is None else replies[kept]
        self._heads, self._head_begins = None, self._begins
        if cut.heads.any():
            self._heads, self._head_begins = cut.heads[kept].astype(np.int32), begins[cut.documents[kept]]

        dropped, repeated = int(cut.bodies[~kept].sum()), int(cut.heads[kept].sum())
        if dropped or not kept.all():
            notes.append(f"{int((~kept).sum()):,} without a token to learn left out ({dropped:,} tokens)")
        notes += chosen
        packed, total = int(self.lengths.sum(dtype=np.int64)), int(lengths.sum())
        conversations = len(np.unique(cut.documents[kept]))
        parts = f" in {len(self.lengths):,} parts" if len(self.lengths) > conversations else ""
        self.summary = (
            f"{conversations:,} conversations{parts}, {packed:,} tokens, {counts.sum() / packed:.2%} of them with loss,"
        )
        again = f" + {repeated:,} repeated" if repeated else ""
        balance = f"{total:,} tokens{again} = {packed:,} packed + {total + repeated - packed:,} dropped"
        self.note = "; " + ", ".join([balance, *notes])

    def read(self, piece: int) -> Piece:
        """Raises ValueError naming file and byte of an id outside the vocabulary."""
        file = 0 if self._files is None else int(self._files[piece])
        head = 0 if self._heads is None else int(self._heads[piece])
        begin, body = int(self._begins[piece]), int(self.lengths[piece]) - head
        ids, roles, weights = self._stretch(file, begin, body, 0 if self._replies is None else int(self._replies[piece]))
        if head:
            head_ids, head_roles, head_weights = self._stretch(file, int(self._head_begins[piece]), head, 0)
            ids, roles = np.concatenate((head_ids, ids)), np.concatenate((head_roles, roles))
            weights = np.concatenate((np.zeros_like(head_weights), weights))  # it is trained where it stands in the file
        return Piece(ids, ids[1:], weights[1:], roles[1:])

    def _stretch(self, file: int, begin: int, count: int, reply: int) -> tuple[IntArray, npt.NDArray[np.uint8], Weights]:
        """Ids, roles and weights of tokens; `reply`: place in the file before which replies are not trained."""
        dataset, (trained, before) = self._datasets[file], self._tables[file]
        assert dataset.roles is not None
        role_bytes = dataset.roles[begin : begin + count]
        weights = trained[role_bytes]
        if begin < reply:
            weights[: reply - begin] = before[role_bytes[: reply - begin]]
        return dataset.read(begin, count), role_bytes & np.uint8(ROLE_MASK), weights

    def _last_replies(self, files: npt.NDArray[np.uint8], begins: IntArray, lengths: IntArray) -> IntArray:
        """Place in its file of the start of each conversation's last reply, its end if there is none."""
        found = begins + lengths
        for number, (file, begin, length) in enumerate(zip(files.tolist(), begins.tolist(), lengths.tolist(), strict=True)):
            roles = self._datasets[file].roles
            assert roles is not None
            found[number] = begin + last_reply((roles[begin : begin + length] & ROLE_MASK).tobytes())
        return found

    def _count_trained(self, files: npt.NDArray[np.uint8], cut: _Cut, replies: IntArray | None) -> IntArray:
        """How many tokens of each piece are predicted with a weight. Raises ValueError for role bytes that mean nothing."""
        counts = np.zeros(len(files), np.int64)
        starts = cut.begins + (cut.heads == 0)  # what nothing before it predicts
        ends = np.maximum(cut.begins + cut.bodies, starts)
        for number, (dataset, tables) in enumerate(zip(self._datasets, self._tables, strict=True)):
            mine = np.flatnonzero(files == number)
            if replies is None:
                counts[mine] = _count(dataset, tables.trained, starts[mine], ends[mine])
                continue
            turn = np.clip(replies[mine], starts[mine], ends[mine])
            counts[mine] = _count(dataset, tables.before, starts[mine], turn) + _count(dataset, tables.trained, turn, ends[mine])
        return counts


def _tables(dataset: IndexedDataset, loss: Loss) -> _Tables:
    """Raises ValueError without role bytes, and for weights of messages that cannot be."""
    if dataset.roles is None:
        raise ValueError(
            f"{dataset.prefix}.roles.bin does not exist, so nobody knows which tokens to train; "
            f"make chat data with `megatron-llm preprocess-chat`, or set data.kind: pretrain"
        )
    by_index = (1.0,) if dataset.meta is None else dataset.meta.weights
    if not 1 <= len(by_index) <= 1 << 8 - WEIGHT_SHIFT or not all(math.isfinite(weight) and weight >= 0 for weight in by_index):
        raise ValueError(
            f"{dataset.prefix}.meta.json: weights {list(by_index)} must be 1 to 16 numbers that are finite and not negative; "
            f"preprocess again"
        )
    tables = _Tables(np.full(256, np.nan, np.float32), np.full(256, np.nan, np.float32))
    for index, weight in enumerate(by_index):
        message = weight if loss.by_message else float(weight > 0)
        for role in ROLES.values():
            byte = index << WEIGHT_SHIFT | role
            trained = loss.train_on == "all" or role == ROLES["assistant"]
            tables.trained[byte] = message * (1.0 if trained else loss.prompt_weight)
            tables.before[byte] = message * loss.prompt_weight
            tables.trained[byte | NOT_TRAINED] = tables.before[byte | NOT_TRAINED] = 0.0
    return tables


def _choose(
    dataset: IndexedDataset, variants: Sequence[Variant], seed: int
) -> tuple[npt.NDArray[np.uint8], IntArray, IntArray, list[str]]:
    """File (0: the conversations, else a variant), place in it and length of each conversation, and phrases about it.

    A hash of (seed, variant, conversation) chooses. Of several variants, a later one chooses among those that no earlier one
    did, at a rate that makes up for them. What is chosen and has no such variant stays as it is.
    """
    offsets = dataset.document_offsets()
    begins, lengths = offsets[:-1], np.diff(offsets)
    files = np.zeros(len(lengths), np.uint8)
    free, share, notes = np.ones(len(lengths), bool), 1.0, []
    for number, variant in enumerate(variants, start=1):
        uniform = (hash_numbers(hash64(seed, number), np.arange(len(lengths))) >> np.uint64(11)) / 2.0**53  # below 1
        chosen = free & (uniform * share < variant.rate)
        free, share = free & ~chosen, max(share - variant.rate, 0.0)
        offsets = variant.dataset.document_offsets()
        there = chosen & (np.diff(offsets) > 0)
        files[there], begins[there], lengths[there] = number, offsets[:-1][there], np.diff(offsets)[there]
        without = int(chosen.sum()) - int(there.sum())
        notes.append(f"{int(there.sum()):,} replaced by {variant.name}" + (f" ({without:,} chosen have none)" if without else ""))
    return files, begins, lengths, notes


def _cut(
    datasets: Sequence[IndexedDataset],
    files: npt.NDArray[np.uint8],
    begins: IntArray,
    lengths: IntArray,
    sequence_length: int,
    overlong: Overlong,
) -> tuple[_Cut, list[str]]:
    """Pieces of at most S tokens, and phrases about what was done to longer conversations. Raises ValueError: see the class."""
    too_long = lengths > sequence_length
    count = int(too_long.sum())
    if count and overlong == "error":
        first = int(np.argmax(too_long))
        raise ValueError(
            f"{datasets[files[first]].prefix}: record {first} (counted from 0) has {lengths[first]} tokens, more than "
            f"training.sequence_length {sequence_length}; {count} of {len(lengths)} records are too long, the longest has "
            f"{lengths.max()}. Raise training.sequence_length, or set data.overlong to drop, truncate or split_turns"
        )
    empty = int((lengths == 0).sum())
    notes = [f"{empty:,} empty"] if empty else []
    kept = np.flatnonzero((lengths > 0) & ~(too_long & (overlong in ("drop", "split_turns"))))
    cut = _Cut(kept, begins[kept], np.minimum(lengths[kept], sequence_length), np.zeros_like(kept))
    longer = f"{count:,} longer than {sequence_length} tokens"
    if count and overlong == "split_turns":
        parts, note = _split(datasets, files, begins, lengths, np.flatnonzero(too_long), sequence_length)
        joined = _Cut(*(np.concatenate(columns) for columns in zip(cut, parts, strict=True)))
        order = np.argsort(joined.documents, kind="stable")
        cut = _Cut(*(column[order] for column in joined))
        notes.append(f"{longer} split {note}")
    elif count:
        lost = int(lengths[too_long].sum()) - (count * sequence_length if overlong == "truncate" else 0)
        notes.append(f"{longer} {'cut' if overlong == 'truncate' else 'dropped'} ({lost:,} tokens)")
    return cut, notes


def _split(
    datasets: Sequence[IndexedDataset],
    files: npt.NDArray[np.uint8],
    begins: IntArray,
    lengths: IntArray,
    documents: IntArray,
    sequence_length: int,
) -> tuple[_Cut, str]:
    """The parts of some conversations, and a phrase about them."""
    parts: list[tuple[int, int, int, int]] = []
    turns = tokens = without_head = 0
    for document in documents.tolist():
        dataset, begin, length = datasets[files[document]], int(begins[document]), int(lengths[document])
        assert dataset.roles is not None
        roles = (dataset.roles[begin : begin + length] & ROLE_MASK).tobytes()
        bos = None if dataset.meta is None else dataset.meta.bos_id
        ids = dataset.tokens[begin : begin + length]
        head = head_length(roles, starts_with_bos=bos is not None and int(ids[0]) == bos)
        for part in split_turns(roles, head, sequence_length, [] if bos is None else np.flatnonzero(ids == bos).tolist()):
            if part.fits:
                parts.append((document, begin + part.start, part.stop - part.start, part.head))
                without_head += part.start > 0 and part.head < head
            else:
                turns, tokens = turns + 1, tokens + part.stop - part.start
    note = f"into {len(parts):,}"
    if without_head:
        note += f" ({without_head:,} without the head, as their turns begin with BOS)"
    if turns:
        note += f", {turns:,} turns longer than a row dropped ({tokens:,} tokens)"
    return _Cut(*np.asarray(parts, np.int64).reshape(-1, 4).T), note


def _count(dataset: IndexedDataset, table: Weights, starts: IntArray, ends: IntArray) -> IntArray:
    """How many role bytes of each stretch [start, end) have a weight. Stretches rise and do not overlap.

    Raises ValueError for bytes without a meaning.
    """
    assert dataset.roles is not None
    kinds = np.where(np.isnan(table), 2, table != 0).astype(np.uint8).tobytes()
    counts = np.empty(len(starts), np.int64)
    for block in _blocks(starts, ends):
        low, high = int(starts[block][0]), int(ends[block][-1])
        found = np.frombuffer(dataset.roles[low:high].tobytes().translate(kinds), np.uint8)
        if len(found) and found.max() > 1:
            place = low + int(np.argmax(found > 1))
            raise ValueError(
                f"{dataset.prefix}.roles.bin has {int(dataset.roles[place])} at byte {place}, which is no role with a weight of "
                f"{dataset.prefix}.meta.json; preprocess again"
            )
        before = np.zeros(len(found) + 1, np.int32)
        np.cumsum(found, out=before[1:])
        counts[block] = before[ends[block] - low] - before[starts[block] - low]
    return counts


def _blocks(starts: IntArray, ends: IntArray) -> Iterator[slice]:
    """Stretches that lie within some million tokens, or a single one."""
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + BLOCK, side="right")))
        yield slice(first, last)
        first = last


def _nothing_left(prefix: str, length: int, loss: Loss, overlong: Overlong, count: int, notes: list[str]) -> str:
    done = f" ({', '.join(notes)})" if notes else ""
    return (
        f"{prefix}: none of {count} conversations has a token to learn in 1 to training.sequence_length {length} tokens with "
        f"data.train_on {loss.train_on} and data.overlong {overlong}{done}; raise the one or change the others"
    )
