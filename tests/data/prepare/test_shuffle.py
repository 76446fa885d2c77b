"""The on-disk shuffle against sorting by the hash in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data.indexed import DatasetMeta, IndexedDataset
from megatron_llm.data.order import hash64, hash_numbers
from megatron_llm.data.prepare import shuffle as module
from megatron_llm.data.prepare.shuffle import shuffle_dataset
from megatron_llm.data.writer import IndexedWriter

META = DatasetMeta(kind="pretrain", tokenizer="tok", tokenizer_fingerprint="f" * 64, vocab_size=1000, eod_id=2)


def expected_order(documents: int, seed: int) -> list[int]:
    return sorted(range(documents), key=lambda number: (hash64(seed, number), number))


def write(prefix: Path, documents: list[list[int]], roles: bool = False, **options: Any) -> None:
    with IndexedWriter(prefix, np.uint16, META, roles, **options) as writer:
        for document in documents:
            writer.add_document(np.array(document), (np.array(document) % 8).astype(np.uint8) if roles else None)


def read(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    dataset.verify()
    return [dataset.document(number).tolist() for number in range(dataset.documents)]


@given(seed=st.integers(-(2**70), 2**70), number=st.integers(0, 2**63 - 1))
def test_the_hash_of_an_array_is_that_of_the_package(seed: int, number: int) -> None:
    assert hash_numbers(seed, np.array([number])).tolist() == [hash64(seed, number)]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=12), min_size=1, max_size=40),
    seed=st.integers(0, 2**64 - 1),
    roles=st.booleans(),
    bucket_bytes=st.sampled_from([1, 100, 1000, 1 << 20]),
    block_bytes=st.sampled_from([64, 200, 1 << 20]),
    copied_items=st.sampled_from([0, 5, 64]),
)
def test_documents_are_in_the_order_of_their_hash_whatever_the_memory(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    seed: int,
    roles: bool,
    bucket_bytes: int,
    block_bytes: int,
    copied_items: int,
) -> None:
    folder = tmp_path_factory.mktemp("d")
    write(folder / "a", documents, roles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUCKET_BYTES", bucket_bytes)
        patch.setattr(module, "BLOCK_BYTES", block_bytes)
        patch.setattr(module, "COPIED_ITEMS", copied_items)
        shuffle_dataset(folder / "a", folder / "b", seed, made_by="me")
    wanted = [documents[number] for number in expected_order(len(documents), seed)]
    assert read(folder / "b") == wanted
    source, dataset = IndexedDataset(folder / "a"), IndexedDataset(folder / "b")
    assert source.meta is not None and dataset.meta is not None
    assert (dataset.meta.max_token_id, dataset.meta.made_by) == (source.meta.max_token_id, "me")
    if roles:
        assert dataset.roles is not None
        assert dataset.roles.tolist() == [token % 8 for document in wanted for token in document]
    assert not list(folder.glob("*.tmp"))


def test_documents_of_several_sequences_stay_whole(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    documents = [[[n, n + 1], [n]] if n % 3 else [[n]] * 4 for n in range(50)]
    for document in documents:
        builder.add_document(torch.tensor(sum(document, [])), [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "a.idx"))
    shuffle_dataset(tmp_path / "a", tmp_path / "b", 3)
    wanted = [documents[number] for number in expected_order(50, 3)]
    theirs = megatron.IndexedDataset(str(tmp_path / "b"))
    assert [sequence.tolist() for sequence in theirs] == sum(wanted, [])
    starts = theirs.document_indices.tolist()
    assert np.diff(starts).tolist() == [len(document) for document in wanted]


def test_the_order_is_random_and_depends_on_the_seed(tmp_path: Path) -> None:
    documents = [[number] for number in range(999)]
    write(tmp_path / "a", documents)
    orders = []
    for seed in range(3):
        shuffle_dataset(tmp_path / "a", tmp_path / "b", seed)
        orders.append([document[0] for document in read(tmp_path / "b")])
    assert all(sorted(order) == list(range(999)) for order in orders)
    fixed = [Counter(a == b for a, b in zip(one, other, strict=True))[True] for one in orders for other in (*orders, range(999))]
    assert sorted(fixed)[:-3] == [count for count in sorted(fixed)[:-3] if count < 12]  # one is expected; 999 with itself


def test_a_failed_shuffle_leaves_nothing_and_the_source_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", [[1], [2, 3]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Shuffle, "_sort", die)
    with pytest.raises(KeyboardInterrupt):
        shuffle_dataset(tmp_path / "a", tmp_path / "b", 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="cannot be shuffled onto itself"):
        shuffle_dataset(tmp_path / "a", tmp_path / "a", 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
