"""Token files against their byte layout, against Megatron's own reader and writer, and against damage."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data import indexed
from megatron_llm.data.indexed import DatasetMeta, IndexedDataset, token_dtype
from megatron_llm.data.rows import PretrainRows
from megatron_llm.data.writer import IndexedWriter

META = DatasetMeta(kind="pretrain", tokenizer="tok", tokenizer_fingerprint="f" * 64, vocab_size=1000, eod_id=2)


def write(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16, **options: Any) -> None:
    with IndexedWriter(prefix, dtype, **options) as writer:
        for document in documents:
            writer.add_document(np.asarray(document))


def write_by_hand(prefix: Path, sequences: list[list[int]], document_indices: list[int]) -> None:
    """int32 files from the format's description alone, with documents of several sequences or none."""
    lengths = [len(sequence) for sequence in sequences]
    pointers = [4 * sum(lengths[:i]) for i in range(len(lengths))]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(lengths), len(document_indices))
    body = struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(document_indices)}q", *lengths, *pointers, *document_indices)
    Path(f"{prefix}.idx").write_bytes(head + body)
    Path(f"{prefix}.bin").write_bytes(b"".join(struct.pack("<i", token) for sequence in sequences for token in sequence))


def test_the_bytes_of_a_small_data_set(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3], [65535]])
    assert (tmp_path / "a.bin").read_bytes() == bytes.fromhex("010002000300ffff")
    assert (tmp_path / "a.idx").read_bytes() == bytes.fromhex(
        "4d4d49444944580000"  # magic
        "0100000000000000"  # version
        "08"  # uint16
        "0200000000000000"  # sequences
        "0300000000000000"  # document indices
        "0300000001000000"  # lengths
        "00000000000000000600000000000000"  # byte offsets
        "000000000000000001000000000000000200000000000000"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=12),
    dtype=st.sampled_from([np.uint16, np.int32, np.int64]),
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: Any) -> None:
    prefix = tmp_path_factory.mktemp("d") / "a"
    write(prefix, documents, dtype, meta=META)
    dataset = IndexedDataset(prefix)
    flat = [token for document in documents for token in document]
    starts = [sum(len(document) for document in documents[:i]) for i in range(len(documents) + 1)]
    assert dataset.tokens.tolist() == flat
    assert dataset.dtype == dtype
    assert dataset.document_offsets().tolist() == starts
    assert [dataset.document(i).tolist() for i in range(dataset.documents)] == documents
    assert dataset.max_token_id() == dataset.scan_max_token_id() == max(flat)
    assert dataset.meta == dataclasses.replace(META, documents=len(documents), tokens=len(flat), max_token_id=max(flat))
    dataset.verify()
    for start in range(len(flat)):
        for end in range(start, len(flat) + 1):
            assert dataset.boundaries(start, end).tolist() == [b for b in starts if start < b < end]


def test_an_index_written_in_many_blocks_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[i] * (1 + i % 3) for i in range(20)]
    write(tmp_path / "a", documents)
    monkeypatch.setattr(indexed, "BLOCK", 7)
    write(tmp_path / "b", documents)
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    dataset = IndexedDataset(tmp_path / "b")
    dataset.verify()
    assert dataset.scan_max_token_id() == 19


def test_documents_of_several_sequences_and_of_none(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a", [[1, 2], [3], [4, 5, 6], [], [7]], [0, 2, 2, 3, 5])
    dataset = IndexedDataset(tmp_path / "a")
    assert dataset.documents == 4
    assert [dataset.document(i).tolist() for i in range(4)] == [[1, 2, 3], [], [4, 5, 6], [7]]
    assert dataset.document_offsets().tolist() == [0, 3, 3, 6, 7]
    assert dataset.boundaries(0, 7).tolist() == [3, 6]
    assert dataset.boundaries(3, 6).tolist() == []
    assert dataset.boundaries(2, 4).tolist() == [3]
    assert dataset.max_token_id() == 7
    dataset.verify()


def test_verify_finds_sequences_that_are_not_back_to_back(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a", [[1, 2], [3], [4]], [0, 1, 2, 3])
    path = tmp_path / "a.idx"
    content = bytearray(path.read_bytes())
    at = 34 + 4 * 3 + 8
    content[at : at + 8] = struct.pack("<q", 4)  # sequence 1 starts inside sequence 0
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"sequence 1 \(byte {at}\)"):
        IndexedDataset(tmp_path / "a").verify()


def test_negative_ids_are_found_with_their_place(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a", [[1, 2, -5]], [0, 1])
    with pytest.raises(ValueError, match="-5 at byte 8"):
        IndexedDataset(tmp_path / "a").max_token_id()


@settings(max_examples=100, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(0, 5), min_size=1, max_size=10))
def test_boundaries_of_documents_of_any_sequences(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, lengths: list[int]
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=8)))
    indices = [0, *cuts, len(lengths)]
    prefix = tmp_path_factory.mktemp("d") / "a"
    write_by_hand(prefix, [[7] * length for length in lengths], indices)
    dataset = IndexedDataset(prefix)
    starts = [sum(lengths[:index]) for index in indices]
    assert dataset.document_offsets().tolist() == starts
    assert [len(dataset.document(i)) for i in range(dataset.documents)] == [b - a for a, b in itertools.pairwise(starts)]
    for start, end in itertools.combinations(range(sum(lengths) + 1), 2):
        assert dataset.boundaries(start, end).tolist() == sorted({b for b in starts if start < b < end})


def everything(prefix: Path) -> None:
    """Every way of reading a data set."""
    dataset = IndexedDataset(prefix, vocab_size=50)
    total = len(dataset.tokens)
    reads: list[Callable[[], Any]] = [
        *(functools.partial(dataset.document, number) for number in range(min(dataset.documents, 20))),
        *(functools.partial(dataset.boundaries, *ends) for ends in itertools.combinations(range(min(total, 8) + 1), 2)),
        *(functools.partial(dataset.read, start, 3) for start in range(min(total, 20))),
        dataset.document_offsets,
        dataset.max_token_id,
        dataset.scan_max_token_id,
        functools.partial(dataset.find_outside, 50),
        dataset.verify,
    ]
    for read in reads:
        with contextlib.suppress(ValueError):
            read()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_a_value_error_at_worst(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("d")
    write(folder / "a", [[1, 2, 3], [4], [5, 6]], meta=META)
    suffix = data.draw(st.sampled_from([".idx", ".idx", ".idx", ".bin", ".meta.json"]))
    path = folder / f"a{suffix}"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        everything(folder / "a")


def test_damage_between_the_ends_of_the_index_is_found_when_it_is_read(tmp_path: Path) -> None:
    sequences = [[1, 2], [3], [4], [5, 6]]
    for at, value, numbers in (
        (34 + 4 * 4 + 8, -1, [0, 1]),  # sequence 1 starts before the file
        (34 + 4 * 4 + 8, 3, [0, 1]),  # within a token
        (34 + 4 * 4 + 8, 1 << 40, [0, 1]),  # beyond the end
        (34 + 12 * 4 + 8, 99, [0, 1]),  # document 1 starts at a sequence that does not exist
        (34 + 12 * 4 + 8, -7, [0, 1]),
        (34 + 12 * 4 + 8, 4, [1]),  # document 1 starts behind document 2
    ):
        write_by_hand(tmp_path / "a", sequences, [0, 1, 2, 3, 4])
        path = tmp_path / "a.idx"
        content = bytearray(path.read_bytes())
        content[at : at + 8] = struct.pack("<q", value)
        path.write_bytes(content)
        dataset = IndexedDataset(tmp_path / "a")
        reads = [functools.partial(dataset.document, number) for number in numbers]
        for read in (*reads, dataset.document_offsets, dataset.verify):
            with pytest.raises(ValueError, match=r"a\.idx.*(damaged|back to back|ends before)"):
                read()
        assert dataset.document(3).tolist() == [5, 6]


@pytest.mark.parametrize(
    "content", [b"[]", b"[" * 100_000, b"\xff", b"3", b'{"kind": 5}', json.dumps({**vars(META), "max_token_id": "many"}).encode()]
)
def test_a_description_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "a", [[1, 2, 3]])
    (tmp_path / "a.meta.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.meta\.json is not a data set description"):
        IndexedDataset(tmp_path / "a")


def test_ids_outside_the_vocabulary_are_named_with_their_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_by_hand(tmp_path / "a", [list(range(20)), [100, 3, -1]], [0, 1, 2])
    dataset = IndexedDataset(tmp_path / "a", vocab_size=20)
    assert dataset.read(0, 20).tolist() == list(range(20))
    assert dataset.read(21, 1).tolist() == [3]
    with pytest.raises(ValueError, match=r"a\.bin has token id 100 at byte 80, outside the model's 0 to 19"):
        dataset.read(15, 8)
    with pytest.raises(ValueError, match=r"a\.bin has token id -1 at byte 88"):
        dataset.read(21, 2)
    with pytest.raises(ValueError, match=r"a\.bin has token id -1 at byte 88"):
        IndexedDataset(tmp_path / "a").read(0, 23)
    monkeypatch.setattr(indexed, "BLOCK", 4)
    places = [dataset.find_outside(size) for size in (1, 10, 20, 101)]
    assert places == [1, 10, 20, 22]
    assert IndexedDataset(tmp_path / "a").read(0, 20).max() < 20


def test_random_reads_are_the_same_reads(tmp_path: Path) -> None:
    """Over many pages, at both ends, and with nothing to read."""
    ids = np.random.default_rng(0).integers(0, 1000, 50_000)
    write(tmp_path / "a", [ids.tolist()], np.int32)
    dataset = IndexedDataset(tmp_path / "a", vocab_size=1000)
    dataset.expect_random_reads()
    for start, count in ((0, 50_000), (0, 0), (49_990, 20), (50_000, 5), (1023, 2), (12_345, 4097)):
        assert np.array_equal(dataset.read(start, count), ids[start : start + count])


def test_places_beyond_2_to_the_31(tmp_path: Path) -> None:
    """Five sequences, the data in the last; the file is sparse and takes no disk."""
    length = 2**31 - 1
    lengths = [length, length, 5, 4, 3]
    tokens = sum(lengths)
    pointers = [2 * sum(lengths[:i]) for i in range(5)]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 5, 6)
    Path(tmp_path / "a.idx").write_bytes(head + struct.pack("<5i5q6q", *lengths, *pointers, *range(6)))
    with open(tmp_path / "a.bin", "wb") as file:
        file.truncate(2 * tokens)
        file.seek(2 * (tokens - 12))
        file.write(np.arange(1, 13, dtype="<u2").tobytes())
    dataset = IndexedDataset(tmp_path / "a", vocab_size=12)
    dataset.expect_random_reads()
    assert len(dataset.tokens) == tokens > 2**32
    assert dataset.document(3).tolist() == [6, 7, 8, 9]
    assert dataset.document_offsets().tolist() == [pointer // 2 for pointer in pointers] + [tokens]
    assert dataset.boundaries(tokens - 20, tokens).tolist() == [tokens - 12, tokens - 7, tokens - 3]
    assert dataset.read(tokens - 12, 11).tolist() == list(range(1, 12))
    with pytest.raises(ValueError, match=f"token id 12 at byte {2 * tokens - 2}"):
        dataset.read(tokens - 12, 12)
    rows = PretrainRows(dataset, 6, seed=0, shuffled=False, isolation=True, masked=True)
    assert rows.rows_per_epoch == (tokens - 1) // 6
    row = rows.row(rows.rows_per_epoch - 2)
    first = 6 * (rows.rows_per_epoch - 2) - (tokens - 13)  # the id that stands there: ids count up to the end
    assert row.tokens.tolist() == [max(0, first + i) for i in range(6)]
    assert row.labels.tolist() == [max(0, first + i + 1) for i in range(6)]
    dataset.verify()


@pytest.mark.parametrize("size", [0, 5, 9, 20, 33, 34, 40, 65])
def test_a_truncated_index_is_refused(tmp_path: Path, size: int) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4]])
    path = tmp_path / "a.idx"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"a\.idx.*byte"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"X", "not a token index: bytes 0-8"),
        (9, b"\x02", "version 2 at byte 9"),
        (17, b"\x06", "dtype code 6 at byte 17"),
        (17, b"\x63", "dtype code 99 at byte 17"),
        (17, b"\x04", r"a\.bin has 8 bytes, but .*a\.idx describes"),
        (18, b"\x09", "promises 9 sequences"),
        (18, b"\xff\xff\xff\xff\xff\xff\xff\x7f", "promises 9223372036854775807 sequences"),
        (58, b"\x01", "do not run from 0 to 2"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4]])
    path = tmp_path / "a.idx"
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        IndexedDataset(tmp_path / "a")


def test_files_that_do_not_fit_the_index_are_refused(tmp_path: Path) -> None:
    roles = np.array([0, 3], np.uint8)
    with IndexedWriter(tmp_path / "a", np.uint16, META, roles=True) as writer:
        writer.add_document(np.array([1, 2]), roles)
    assert IndexedDataset(tmp_path / "a").roles.tolist() == [0, 3]  # type: ignore[union-attr]
    for name, content, message in (
        ("a.bin", b"\0\0", "2 bytes, but .* describes 4"),
        ("a.bin", b"\0" * 6, "6 bytes, but .* describes 4"),
        ("a.roles.bin", b"\0", "1 bytes for 2 tokens"),
        ("a.meta.json", b"{", r"a\.meta\.json is not a data set description"),
        ("a.meta.json", json.dumps({**dataclasses.asdict(META), "tokens": 3}).encode(), "belongs to another data set"),
    ):
        path = tmp_path / name
        good = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            IndexedDataset(tmp_path / "a")
        path.write_bytes(good)
    IndexedDataset(tmp_path / "a")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.idx does not exist; a data set is PREFIX"):
        IndexedDataset(tmp_path / "nothing")
    write(tmp_path / "a", [[1]])
    with pytest.raises(ValueError, match=r"without \.bin"):
        IndexedDataset(tmp_path / "a.bin")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ValueError, match=r"a\.bin does not exist"):
        IndexedDataset(tmp_path / "a")


def test_a_failed_writer_leaves_the_old_data_set_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "a", np.int32, META) as writer:
        writer.add_document(np.array([5]))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="no document"), IndexedWriter(tmp_path / "a", np.int32):
        pass
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_data_set_replaces_all_files_of_the_old_one(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16, META, roles=True) as writer:
        writer.add_document(np.array([1, 2]), np.array([3, 3], np.uint8))
    write(tmp_path / "a", [[7, 8]])  # same size: stale roles or meta would go unnoticed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert IndexedDataset(tmp_path / "a").tokens.tolist() == [7, 8]


@pytest.mark.parametrize(("dtype", "token"), [(np.uint16, 65536), (np.uint16, -1), (np.int32, 2**31)])
def test_ids_that_would_wrap_are_refused(tmp_path: Path, dtype: Any, token: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token}, outside"):
        write(tmp_path / "a", [[0, token]], dtype)


def test_empty_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="document 1 has no tokens"):
        write(tmp_path / "a", [[1], []])


def test_two_writers_of_one_prefix_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as first:
        first.add_document(np.array([1, 2, 3]))
        with pytest.raises(ValueError, match="being written by another process"):
            IndexedWriter(tmp_path / "a", np.uint16)
        first.add_document(np.array([4]))
    assert IndexedDataset(tmp_path / "a").tokens.tolist() == [1, 2, 3, 4]


def test_dtype_follows_the_vocabulary() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_megatron_reads_ours_and_we_read_megatrons(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = [[3, 1, 4], [1], [5, 9, 2, 6]]
    write(tmp_path / "ours", documents, meta=META)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [sequence.tolist() for sequence in theirs] == documents
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]

    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for document in documents:
        builder.add_document(torch.tensor(document + document), [len(document)] * 2)
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = IndexedDataset(tmp_path / "theirs")
    assert [ours.document(i).tolist() for i in range(ours.documents)] == [document + document for document in documents]
    ours.verify()
