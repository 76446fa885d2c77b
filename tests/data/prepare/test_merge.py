"""Merging against Megatron's own `add_index`, and everything that does not belong together."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data.indexed import WEIGHT_SHIFT, DatasetMeta, IndexedDataset
from megatron_llm.data.order import hash64
from megatron_llm.data.prepare import merge as module
from megatron_llm.data.prepare.merge import merge, shard_prefix
from megatron_llm.data.prepare.preprocess import preprocess
from megatron_llm.data.writer import IndexedWriter

META = DatasetMeta(kind="pretrain", tokenizer="tok", tokenizer_fingerprint="f" * 64, vocab_size=1000, eod_id=2)


def write(prefix: str | Path, documents: list[list[int]], dtype: Any = np.uint16, meta: DatasetMeta | None = META) -> Path:
    with IndexedWriter(prefix, dtype, meta, allow_empty=True) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    return Path(prefix)


def write_shard(base: Path, number: int, count: int, documents: list[list[int]]) -> Path:
    meta = dataclasses.replace(META, shard=(number, count), made_by=f"{number}", input_bytes=7, skipped={"empty text": 1})
    return write(shard_prefix(base, number, count), documents, meta=meta)


def read(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    dataset.verify()
    return [dataset.document(number).tolist() for number in range(dataset.documents)]


DOCUMENTS = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=4), max_size=9)


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(DOCUMENTS, min_size=1, max_size=5), by_hand=st.booleans())
def test_merged_equals_written_at_once(tmp_path_factory: pytest.TempPathFactory, parts: list[Any], by_hand: bool) -> None:
    """Byte for byte, whether the kernel copies or refuses to."""
    documents = [document for part in parts for document in part]
    folder = tmp_path_factory.mktemp("d")
    prefixes = [write(folder / f"part{number}", part) for number, part in enumerate(parts)]
    if not documents:
        with pytest.raises(ValueError, match="none of the .* data sets has a document"):
            merge(prefixes, folder / "out", progress=False)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COPY_BYTES", 64)
        if by_hand:
            patch.setattr(os, "copy_file_range", lambda *arguments: 0)
        merge(prefixes, folder / "out", progress=False)
    write(folder / "whole", documents)
    for suffix in (".bin", ".idx", ".meta.json"):
        assert Path(f"{folder}/out{suffix}").read_bytes() == Path(f"{folder}/whole{suffix}").read_bytes()
    assert not list(folder.glob("*.tmp"))


def test_megatron_merges_alike(tmp_path: Path) -> None:
    """Documents of several sequences, without a meta file, as its own builder joins them."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    for name, documents in (("a", [[[1, 2], [3]], [[4]]]), ("b", [[[5]], [[6], [7, 8], [9]]])):
        builder = megatron.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.int32)
        for document in documents:
            builder.add_document(torch.tensor(sum(document, [])), [len(sequence) for sequence in document])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ours", progress=False)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    builder.add_index(str(tmp_path / "a"))
    builder.add_index(str(tmp_path / "b"))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/ours{suffix}").read_bytes() == Path(f"{tmp_path}/theirs{suffix}").read_bytes()
    dataset = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [sequence.tolist() for sequence in dataset] == [[1, 2], [3], [4], [5], [6], [7, 8], [9]]
    assert dataset.document_indices.tolist() == [0, 2, 3, 4, 7]


def test_shards_are_sorted_by_number_and_their_accounts_added(tmp_path: Path) -> None:
    parts: list[list[list[int]]] = [[[number, number]] for number in range(12)]
    parts[5] = []  # a shard may have no document
    paths = [write_shard(tmp_path / "a", number, 12, part) for number, part in enumerate(parts)]
    merge(paths[::-1], tmp_path / "out", progress=False)
    assert read(tmp_path / "out") == [document for part in parts for document in part]
    meta = IndexedDataset(tmp_path / "out").meta
    assert meta is not None
    assert (meta.shard, meta.made_by, meta.input_bytes, meta.skipped) == (None, None, 84, {"empty text": 12})
    assert (meta.documents, meta.tokens, meta.max_token_id) == (11, 22, 11)


@pytest.mark.parametrize("pattern", ["a-*", "a-*.idx", "*-of-00003.idx"])
def test_globs(tmp_path: Path, pattern: str) -> None:
    for number in range(3):
        write_shard(tmp_path / "a", number, 3, [[number]])
    merge([f"{tmp_path}/{pattern}"], tmp_path / "out", progress=False)
    assert read(tmp_path / "out") == [[0], [1], [2]]
    with pytest.raises(ValueError, match="no data set matches"):
        merge([tmp_path / "b-*"], tmp_path / "out")


def test_missing_and_doubled_shards_are_named(tmp_path: Path) -> None:
    for number in (0, 2):
        write_shard(tmp_path / "a", number, 4, [[number]])
    write_shard(tmp_path / "b", 0, 1, [[7]])
    with pytest.raises(ValueError, match=r"missing shards: .*/a-00001-of-00004, .*/a-00003-of-00004"):
        merge([tmp_path / "a-*", tmp_path / "b-*"], tmp_path / "out")
    (tmp_path / "sub").mkdir()
    for number in (1, 3):
        write_shard(tmp_path / "a", number, 4, [[number]])
    for suffix in (".bin", ".idx", ".meta.json"):
        os.link(f"{tmp_path}/a-00001-of-00004{suffix}", f"{tmp_path}/a-00009-of-00004{suffix}")
    with pytest.raises(ValueError, match=r"same shard: .*a-00001-of-00004, .*a-00009-of-00004"):
        merge([tmp_path / "a-*"], tmp_path / "out")


@pytest.mark.parametrize("change", ["a file more", "another key", "another split"])
def test_shards_of_different_wholes_are_refused(tmp_path: Path, tokenizer_folder: Path, change: str) -> None:
    """What every shard takes follows from what all inputs are: with others, documents would be missing or there twice."""
    for number in range(20):
        (tmp_path / f"{number % 2}.jsonl").open("a").write(f'{{"text": "hello {number}", "title": "world {number}"}}\n')
    options: dict[str, Any] = {"progress": False, "text_key": "text"}
    preprocess([tmp_path / "*.jsonl"], tokenizer_folder, tmp_path / "out", shard=(0, 2), **options)
    if change == "a file more":
        (tmp_path / "2.jsonl").write_text('{"text": "more"}\n' * 9)
    elif change == "another key":
        options["text_key"] = "title"
    else:
        options["split"] = [1.0, 0.0]
    preprocess([tmp_path / "*.jsonl"], tokenizer_folder, tmp_path / "out", shard=(1, 2), **options)
    for side in tmp_path.glob("out-train-00001*"):
        side.rename(tmp_path / side.name.replace("-train", ""))
    with pytest.raises(ValueError, match="shards of .*/out were cut from different inputs or with different options"):
        merge([tmp_path / "out-*"], tmp_path / "all", progress=False)


def test_two_sharded_data_sets_stay_apart(tmp_path: Path) -> None:
    for name, first in (("b", 10), ("a", 20)):
        for number in range(2):
            write_shard(tmp_path / name, number, 2, [[first + number]])
    merge([tmp_path / "b-*", tmp_path / "a-*"], tmp_path / "out", progress=False)
    assert read(tmp_path / "out") == [[10], [11], [20], [21]]


def test_what_is_given_twice_or_written_over_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1]])
    write(tmp_path / "b", [[2]])
    with pytest.raises(ValueError, match="given twice: .*/a"):
        merge([tmp_path / "a", tmp_path / "b", tmp_path / "a.idx"], tmp_path / "out")
    with pytest.raises(ValueError, match="given twice: .*/a"):
        merge([tmp_path / "a", tmp_path / "x" / ".." / "a"], tmp_path / "out")
    for output in (tmp_path / "b", tmp_path / "x" / ".." / "b"):
        with pytest.raises(ValueError, match="is one of the data sets to be merged"):
            merge([tmp_path / "a", tmp_path / "b"], output)
    with pytest.raises(ValueError, match="--output '.*/' ends without a name for the files"):
        merge([tmp_path / "a", tmp_path / "b"], f"{tmp_path}/new/")
    with pytest.raises(ValueError, match=r"nothing\.idx does not exist"):
        merge([tmp_path / "nothing"], tmp_path / "out")
    assert (read(tmp_path / "a"), read(tmp_path / "b")) == ([[1]], [[2]])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dataclasses.replace(META, tokenizer_fingerprint="e" * 64), "different tokenizers .*: f{64} and e{64}"),
        (dataclasses.replace(META, eod_id=None), "different ids at the end of documents: 2 and None"),
        (dataclasses.replace(META, kind="chat"), "different kinds of data: pretrain and chat"),
        (None, r"b\.meta\.json is missing"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, other: DatasetMeta | None, message: str) -> None:
    write(tmp_path / "a", [[1]])
    write(tmp_path / "b", [[2]], meta=other)
    with pytest.raises(ValueError, match=f"a and .*b.*{message}"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_chat_data_keeps_its_roles_and_stays_among_itself(tmp_path: Path) -> None:
    for name, first in (("a", 1), ("b", 5)):
        with IndexedWriter(tmp_path / name, np.uint16, dataclasses.replace(META, kind="chat"), roles=True) as writer:
            writer.add_document(np.array([first, first + 1]), np.array([first, 3], np.uint8))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", progress=False)
    roles = IndexedDataset(tmp_path / "out").roles
    assert roles is not None and roles.tolist() == [1, 3, 5, 3]
    write(tmp_path / "c", [[1]])
    with pytest.raises(ValueError, match="merge chat data with chat data only"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_token_types_that_agree_are_kept(tmp_path: Path, dtype: Any) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, [[1, 2]], dtype)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", progress=False)
    assert IndexedDataset(tmp_path / "out").dtype == dtype and read(tmp_path / "out") == [[1, 2], [1, 2]]


def test_token_types_that_differ_are_widened(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 65535]])
    write(tmp_path / "b", [[70000]], np.int32)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", progress=False)
    assert IndexedDataset(tmp_path / "out").dtype == np.int32
    assert read(tmp_path / "out") == [[1, 65535], [70000]]


def test_shuffling_what_is_merged_is_shuffling_the_whole(tmp_path: Path) -> None:
    documents = [[number, number + 1] for number in range(40)]
    for number in range(4):
        write_shard(tmp_path / "a", number, 4, documents[10 * number : 10 * number + 10])
    merge([tmp_path / "a-*"], tmp_path / "out", shuffle_seed=5, progress=False)
    assert read(tmp_path / "out") == [documents[number] for number in sorted(range(40), key=lambda n: hash64(5, n))]
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.meta.json"]


def test_damaged_sources_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    write(tmp_path / "b", [[1, 2], [3]])
    path = tmp_path / "b.idx"
    content = bytearray(path.read_bytes())
    content[34 + 8 + 8] = 2  # sequence 1 starts inside sequence 0
    path.write_bytes(content)
    with pytest.raises(ValueError, match="b.*sequence"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", progress=False)
    content = bytearray((tmp_path / "a.idx").read_bytes()) + b"\0\1"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.idx has sequence modes"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("other", ["valid", "test"])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_sides_of_a_split_are_not_joined(tmp_path: Path, sharded: bool, other: str) -> None:
    """A glob that takes both would put the validation documents into training."""
    for side in ("train", other):
        base = tmp_path / f"x-{side}"
        write_shard(base, 0, 1, [[1, 2]]) if sharded else write(base, [[1, 2]])
    with pytest.raises(ValueError, match=f"x-train and .*x-{other} are two sides of a split"):
        merge([tmp_path / "x-*"], tmp_path / "out", progress=False)


def write_weighted(prefix: Path, weights: tuple[float, ...], roles: list[int]) -> Path:
    meta = dataclasses.replace(META, kind="chat", eod_id=None, weights=weights)
    with IndexedWriter(prefix, np.uint16, meta, roles=True) as writer:
        writer.add_document(np.arange(len(roles)), np.array(roles, np.uint8))
    return prefix


def weights_of(prefix: Path) -> list[tuple[int, float]]:
    """(bits 0-3, loss weight) of every token."""
    dataset = IndexedDataset(prefix)
    assert dataset.meta is not None and dataset.roles is not None
    return [(code & 0b1111, dataset.meta.weights[code >> WEIGHT_SHIFT]) for code in dataset.roles.tolist()]


def test_tables_of_weights_become_one(tmp_path: Path) -> None:
    """Every token keeps its weight, though the numbers of the weights differ."""
    tables = [(1.0, 0.5), (1.0,), (1.0, 2.0, 0.5), (1.0, 0.5, 3.0)]
    parts = [
        write_weighted(
            tmp_path / f"part{number}",
            table,
            [3 | bits | index << WEIGHT_SHIFT for index in range(len(table)) for bits in (0, 8)],
        )
        for number, table in enumerate(tables)
    ]
    merge(parts, tmp_path / "out", progress=False)
    meta = IndexedDataset(tmp_path / "out").meta
    assert meta is not None and meta.weights == (1.0, 0.5, 2.0, 3.0)
    assert weights_of(tmp_path / "out") == [pair for part in parts for pair in weights_of(part)]


def test_more_than_sixteen_weights_are_refused(tmp_path: Path) -> None:
    tables = [(1.0, *(float(weight) for weight in range(first, first + 8))) for first in (2, 10)]
    parts = [write_weighted(tmp_path / f"part{number}", table, [3]) for number, table in enumerate(tables)]
    with pytest.raises(ValueError, match="have 17 different loss weights of messages, 16 can be told apart"):
        merge(parts, tmp_path / "out", progress=False)
