"""What `inspect` computes, against numpy and plain Python on everything at once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data import statistics
from megatron_llm.data.indexed import DatasetMeta, IndexedDataset
from megatron_llm.data.writer import IndexedWriter
from tests.data.test_indexed import write_by_hand


def write(prefix: Path, documents: list[list[int]], vocab_size: int | None = 100) -> IndexedDataset:
    meta = None if vocab_size is None else DatasetMeta("pretrain", "tok", "0" * 64, vocab_size)
    with IndexedWriter(prefix, np.uint16, meta) as writer:
        for document in documents:
            writer.add_document(np.asarray(document))
    return IndexedDataset(prefix)


@settings(max_examples=100, deadline=None)
@given(
    sequences=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    span=st.integers(1, 40),
    short=st.integers(1, 14),
    data=st.data(),
)
def test_lengths(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[int], span: int, short: int, data: st.DataObject
) -> None:
    """Documents of any number of sequences, also of none, with blocks of any size."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sequences)), max_size=10)))
    indices = [0, *cuts, len(sequences)]
    prefix = tmp_path_factory.mktemp("s") / "a"
    write_by_hand(prefix, [[1] * length for length in sequences], indices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "SPAN", span)
        patch.setattr(statistics, "SHORT", short)
        counts = statistics.length_counts(IndexedDataset(prefix))
    lengths = [sum(sequences[start:end]) for start, end in zip(indices, indices[1:], strict=False)]
    assert dict(zip(counts.lengths.tolist(), counts.documents.tolist(), strict=True)) == Counter(lengths)
    assert counts.lengths.tolist() == sorted(set(lengths))
    for percent in (0, 1, 10, 50, 90, 99, 100):
        assert counts.percentile(percent) == np.percentile(lengths, percent, method="inverted_cdf")


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 120), min_size=1, max_size=9), min_size=1, max_size=12),
    block=st.integers(1, 50),
    meta=st.booleans(),
)
def test_every_id_is_counted(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], block: int, meta: bool
) -> None:
    dataset = write(tmp_path_factory.mktemp("s") / "a", documents, 100 if meta else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BLOCK", block)
        counted = statistics.token_counts(dataset)
    expected = Counter(token for document in documents for token in document)
    size = 100 if meta else max(expected) + 1
    assert counted.counts.tolist() == [expected[token] for token in range(size)]
    assert counted.outside == sum(count for token, count in expected.items() if token >= size)
    assert counted.read == len(dataset.tokens)
    inside = Counter({token: count for token, count in expected.items() if token < size})
    best = sorted(inside.items(), key=lambda item: (-item[1], item[0]))[:5]
    assert counted.most_frequent(5) == [(token, count / len(dataset.tokens)) for token, count in best]


def test_a_large_data_set_is_counted_in_spaced_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 10)
    dataset = write(tmp_path / "a", [[number // 10 for number in range(500)], [49] * 3])  # token i lies in block i // 10
    counted = statistics.token_counts(dataset, limit=60)
    assert np.flatnonzero(counted.counts).tolist() == [0, 10, 20, 30, 40, 49]  # the last block is the three tokens
    assert (counted.read, counted.counts.sum()) == (53, 53)


def test_damaged_ids_are_outside(tmp_path: Path) -> None:
    """Ids that would need a table of 17 GB."""
    write_by_hand(tmp_path / "a", [[1, 2**31 - 1, -5, 2]], [0, 1])
    counted = statistics.token_counts(IndexedDataset(tmp_path / "a"))
    assert (counted.counts.tolist(), counted.outside, counted.read) == ([0, 1, 1], 2, 4)


def test_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 3)
    roles = np.asarray([0, 1, 2, 2, 3, 3, 3, 0x13, 3 | 8, 4, 4 | 8], np.uint8)
    assert statistics.role_counts(roles) == ({"none": 1, "system": 1, "user": 2, "assistant": 5, "tool": 2}, 4)


def test_verify_returns_the_largest_id(tmp_path: Path) -> None:
    assert statistics.verify_data(write(tmp_path / "a", [[3, 99], [7]])) == 99
    assert statistics.verify_data(write(tmp_path / "a", [[3, 99], [7]], None)) == 99


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, 100, r"a\.bin has token id 100 at byte 4, outside the 100 ids"),
        (2, 98, "says the largest token id is 97, but it is 98"),
        (0, 1, "says the largest token id is 97, but it is 9"),
    ],
)
def test_verify_finds_a_changed_id(tmp_path: Path, at: int, value: int, message: str) -> None:
    write(tmp_path / "a", [[97, 4], [9]])
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[at : at + 2] = value.to_bytes(2, "little")
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        statistics.verify_data(IndexedDataset(tmp_path / "a"))


def test_verify_finds_a_damaged_index(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3], [4]])
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[34 + 12 + 8] = 2  # sequence 1 starts inside sequence 0
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.idx: sequence 1 \(byte 54\)"):
        statistics.verify_data(IndexedDataset(tmp_path / "a"))


@pytest.mark.parametrize("documents", [[[5]], [[5, 5], [6]], [[1] * 4000, [2], [3] * 17]])
def test_a_picture_of_any_data_set(tmp_path: Path, documents: list[list[int]]) -> None:
    dataset = write(tmp_path / "a", documents)
    path = tmp_path / "a.picture"
    statistics.plot(path, dataset, statistics.length_counts(dataset), statistics.token_counts(dataset))
    from matplotlib.image import imread

    with open(path, "rb") as file:
        pixels = imread(file, format="png")
    assert pixels.shape[:2] == (720, 1800)
    assert pixels[..., :3].std() > 0.05  # something is drawn


def test_the_picture_shows_all_documents_and_ids(tmp_path: Path) -> None:
    """What the axes hold, not how it looks: the bins hold every document, the curve every id by rank."""
    from matplotlib.figure import Figure

    rng = np.random.default_rng(0)
    lengths = (rng.lognormal(3, 1, 300).astype(int) + 1).tolist()
    dataset = write(tmp_path / "a", [rng.zipf(1.5, length).clip(0, 99).tolist() for length in lengths])
    left, right = Figure().subplots(1, 2)
    statistics._plot_lengths(left, statistics.length_counts(dataset))
    heights, edges, _ = left.patches[0].get_data()
    assert heights.sum() == 300
    assert [int(height) for height in heights] == [
        sum(low < length < high for length in lengths) for low, high in zip(edges, edges[1:], strict=False)
    ]
    assert left.get_legend_handles_labels()[1][1] == f"mean {np.mean(lengths):,.0f}"
    counts = statistics.token_counts(dataset)
    statistics._plot_ranks(right, counts, len(dataset.tokens))
    curve = right.lines[0].get_ydata()
    assert list(curve) == sorted(Counter(dataset.tokens.tolist()).values(), reverse=True)


def test_an_empty_data_set_has_no_picture(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a", [[], []], [0, 1, 2])
    dataset = IndexedDataset(tmp_path / "a")
    lengths, tokens = statistics.length_counts(dataset), statistics.token_counts(dataset)
    assert (lengths.lengths.tolist(), lengths.documents.tolist(), tokens.read) == ([0], [2], 0)
    with pytest.raises(ValueError, match="no tokens to plot"):
        statistics.plot(tmp_path / "a.png", dataset, lengths, tokens)
