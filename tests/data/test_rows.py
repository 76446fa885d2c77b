"""Rows of one source against brute force. Token ids are their own places, so a row says where each token came from."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data.chat_rows import ConversationPieces, Loss
from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.rows import PackedRows, PretrainRows, Row, document_rows
from megatron_llm.data.writer import IndexedWriter

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def write(prefix: Path, lengths: list[int], first: int = 0) -> IndexedDataset:
    at = first
    with IndexedWriter(prefix, np.int32) as writer:
        for length in lengths:
            writer.add_document(np.arange(at, at + length))
            at += length
    return IndexedDataset(prefix, vocab_size=at)


def starts_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)][:-1]


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    length=st.integers(1, 20),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 30),
    isolation=st.booleans(),
    masked=st.booleans(),
)
def test_windows_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    length: int,
    seed: int,
    epoch: int,
    isolation: bool,
    masked: bool,
) -> None:
    """An epoch predicts rows * S different tokens, whatever the sizes; segments and masks are where documents start."""
    total = sum(lengths)
    dataset = write(tmp_path_factory.mktemp("d") / "a", lengths)
    if total <= length:
        with pytest.raises(ValueError, match=f"{total} tokens, but one row takes {length + 1}"):
            PretrainRows(dataset, length, seed, True, isolation, masked)
        return
    rows = PretrainRows(dataset, length, seed, True, isolation, masked)
    assert rows.rows_per_epoch == (total - 1) // length
    starts = set(starts_of(lengths))
    labels = []
    for number in range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch):
        row = rows.row(number)
        tokens = row.tokens.tolist()
        assert tokens == [(tokens[0] + i) % total for i in range(length)]
        assert row.labels.tolist() == [(token + 1) % total for token in tokens]
        assert row.weights.tolist() == [0.0 if masked and label in starts else 1.0 for label in row.labels.tolist()]
        assert row.starts.tolist() == [i for i, token in enumerate(tokens) if i == 0 or (isolation and token in starts)]
        labels += row.labels.tolist()
    assert len(set(labels)) == len(labels) == rows.rows_per_epoch * length


def segments(row: Row) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise([*row.starts.tolist(), len(row.tokens)])]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, length=st.integers(1, 20), seed=st.integers(0, 9), shuffled=st.booleans())
def test_best_fit_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, seed: int, shuffled: bool
) -> None:
    """Every token once an epoch, and all predictions within documents, over the cuts of long ones too; nothing else."""
    dataset = write(tmp_path_factory.mktemp("d") / "a", lengths, first=1)  # id 0 fills rows
    starts = [1 + start for start in starts_of(lengths)]
    document = {start + i: number for number, start in enumerate(starts) for i in range(lengths[number])}
    rows = document_rows(dataset, length, seed, shuffled)
    orders = []
    for epoch in range(3):
        seen, predicted, cuts = [], [], 0
        for number in range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch):
            row = rows.row(number)
            for part in segments(row):
                tokens, labels, weights = row.tokens[part].tolist(), row.labels[part].tolist(), row.weights[part].tolist()
                if tokens[0] == 0:
                    assert tokens == labels == weights == [0] * len(tokens)
                    assert part.stop == length
                    continue
                assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
                assert len({document[token] for token in tokens}) == 1
                offset = tokens[0] - starts[document[tokens[0]]]
                assert offset % length == 0, "documents are cut into full rows"
                assert len(tokens) == min(length, lengths[document[tokens[0]]] - offset)
                cuts += offset > 0
                goes_on = document.get(tokens[-1] + 1) == document[tokens[0]]
                assert weights == [1.0] * (len(tokens) - 1) + [float(goes_on)]
                assert [label for label, weight in zip(labels, weights, strict=True) if weight] == [
                    token + 1 for token, weight in zip(tokens, weights, strict=True) if weight
                ]
                seen += tokens
                predicted += [label for label, weight in zip(labels, weights, strict=True) if weight]
        assert sorted(seen) == sorted(document)
        assert sorted(predicted) == sorted(set(document) - set(starts))
        assert cuts == sum(-(-n // length) - 1 for n in lengths)
        orders.append(seen)
    if not shuffled:
        assert orders[0] == orders[1] == orders[2]


def test_best_fit_summary(tmp_path: Path) -> None:
    """12 tokens a row: concatenation cuts the documents that lie across 12 and 24; one ends at 36, which is no cut."""
    rows = document_rows(write(tmp_path / "a", [5, 9, 13, 9, 2]), 12, 0, True)
    expected = "5 documents, 38 tokens, in 4 rows an epoch (79.17% full), 1 documents cut (packing concat cuts 2)"
    assert rows.rows_per_epoch == 4
    assert rows.summary == expected


def test_best_fit_epochs_differ(tmp_path: Path) -> None:
    rows = document_rows(write(tmp_path / "a", [6, 6, 4, 4, 7, 3] * 8, first=1), 10, 0, True)
    count = rows.rows_per_epoch
    epochs = [[tuple(rows.row(epoch * count + i).tokens.tolist()) for i in range(count)] for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({frozenset(epoch) for epoch in epochs}) == 4, "other documents meet in a row, too"


def test_ids_outside_the_vocabulary_are_found_when_read(tmp_path: Path) -> None:
    """A description that says otherwise does not help: rows look at what they read."""
    with IndexedWriter(tmp_path / "a", np.int32, roles=True) as writer:
        writer.add_document(np.array([1, 2, 3, 50, 4, 5]), np.full(6, 3, np.uint8))
    dataset = IndexedDataset(tmp_path / "a", vocab_size=50)
    for rows in (
        PretrainRows(dataset, 5, 0, False, True, True),
        document_rows(dataset, 6, 0, False),
        PackedRows(ConversationPieces(dataset, 6, Loss("all"), "error"), 6, 0, "file", "best_fit"),
    ):
        with pytest.raises(ValueError, match=r"a\.bin has token id 50 at byte 12, outside the model's 0 to 49"):
            rows.row(0)
    PretrainRows(IndexedDataset(tmp_path / "a", vocab_size=51), 5, 0, False, True, True).row(0)
