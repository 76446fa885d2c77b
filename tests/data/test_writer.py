"""The writer: many documents at once, memory that does not grow, going on after an interruption, and one writer at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data import writer as module
from megatron_llm.data.indexed import DatasetMeta, IndexedDataset
from megatron_llm.data.writer import IndexedWriter, Journal, open_exclusive, publish

META = DatasetMeta(kind="pretrain", tokenizer="tok", tokenizer_fingerprint="f" * 64, vocab_size=1000, eod_id=2)
Documents = list[list[int]]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def add(writer: IndexedWriter, documents: Documents) -> None:
    flat = np.array([token for document in documents for token in document], np.int64)
    writer.add_documents(flat, np.array([len(document) for document in documents], np.int64))


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=5), max_size=6), min_size=1, max_size=5),
    block=st.integers(1, 5),
)
def test_documents_together_or_one_by_one_in_any_blocks(
    tmp_path_factory: pytest.TempPathFactory, groups: list[Documents], block: int
) -> None:
    documents = [document for group in groups for document in group]
    if not documents:
        return
    folder = tmp_path_factory.mktemp("d")
    with IndexedWriter(folder / "one", np.uint16, META) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        with IndexedWriter(folder / "all", np.uint16, META) as writer:
            for group in groups:
                add(writer, group)
    written = files(folder)
    for suffix in (".bin", ".idx", ".meta.json"):
        assert written["one" + suffix] == written["all" + suffix]
    dataset = IndexedDataset(folder / "all")
    assert [dataset.document(number).tolist() for number in range(dataset.documents)] == documents


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[1], [], [2]], "document 4 has no tokens"),
        ([[1, 2], [3, 70000]], "document 4 has token id 70000, outside 0..65535 of uint16"),
        ([[1, 2], [3], [-1, 70000]], "document 5 has token id -1, outside"),
    ],
)
def test_the_document_that_cannot_be_written_is_named(tmp_path: Path, documents: Documents, message: str) -> None:
    with pytest.raises(ValueError, match=message), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        add(writer, [[7], [8], [9]])
        add(writer, documents)
    assert files(tmp_path) == {}


def test_memory_does_not_grow_with_documents(tmp_path: Path) -> None:
    """Two million documents take 40 MB in the index alone."""
    tokens, lengths = np.ones(10_000, np.uint16), np.ones(10_000, np.int64)
    tracemalloc.start()
    try:
        with IndexedWriter(tmp_path / "a", np.uint16) as writer:
            for _ in range(200):
                writer.add_documents(tokens, lengths)
            assert tracemalloc.get_traced_memory()[1] < 6e6
            tracemalloc.reset_peak()
        assert tracemalloc.get_traced_memory()[1] < 60e6  # blocks of a million entries
    finally:
        tracemalloc.stop()
    assert IndexedDataset(tmp_path / "a").documents == 2_000_000


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(
        st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=4), min_size=1, max_size=4), min_size=1, max_size=5
    ),
    lost=st.lists(st.integers(0, 999), min_size=1, max_size=9),
    roles=st.booleans(),
)
def test_an_interrupted_writer_goes_on_from_its_last_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, parts: list[Documents], lost: list[int], roles: bool
) -> None:
    """Whatever was written after the checkpoint, and however often it happens, the files are those of an undisturbed one."""
    folder = tmp_path_factory.mktemp("d")

    def write(writer: IndexedWriter, documents: Documents) -> None:
        for document in documents:
            writer.add_document(np.array(document), np.full(len(document), len(document), np.uint8) if roles else None)

    with IndexedWriter(folder / "whole", np.uint16, META, roles) as writer:
        for part in parts:
            write(writer, part)
    state = None
    for part in parts:
        with pytest.raises(KeyboardInterrupt), IndexedWriter(folder / "cut", np.uint16, META, roles, resume=state) as writer:
            write(writer, part)
            state = writer.checkpoint()
            write(writer, [lost])
            raise KeyboardInterrupt
        state = json.loads(json.dumps(state))
    with IndexedWriter(folder / "cut", np.uint16, META, roles, resume=state):
        pass
    written = files(folder)
    names = {name.removeprefix("whole") for name in written if name.startswith("whole")}
    assert set(written) == {prefix + name for prefix in ("whole", "cut") for name in names}
    assert all(written["whole" + name] == written["cut" + name] for name in names)


def test_files_shorter_than_the_journal_says_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        add(writer, [[1, 2, 3]])
        state = writer.checkpoint()
        raise KeyboardInterrupt
    (tmp_path / "a.bin.tmp").write_bytes(b"\1\0")
    with pytest.raises(ValueError, match=r"a\.bin\.tmp has 2 bytes, its journal says 6"):
        IndexedWriter(tmp_path / "a", np.uint16, resume=state)


def test_a_finished_writer_is_put_in_place_by_another_process(tmp_path: Path) -> None:
    """Killed between any two renames: `publish` does the rest, and what was there before is gone or whole at every moment."""
    with IndexedWriter(tmp_path / "old", np.uint16, META, roles=True) as writer:
        writer.add_document(np.array([9, 9]), np.array([1, 1], np.uint8))
    with IndexedWriter(tmp_path / "new", np.uint16, dataclasses.replace(META, vocab_size=7)) as writer:
        add(writer, [[5, 6], [4]])
    old, new = files(tmp_path), {}
    for name in list(old):
        if name.startswith("new"):
            new[name.removeprefix("new")] = old.pop(name)
    real = os.replace
    for dies_after in range(4):
        folder = tmp_path / str(dies_after)
        folder.mkdir()
        for name, content in old.items():
            (folder / name.replace("old", "a")).write_bytes(content)
        for suffix, content in new.items():
            (folder / f"a{suffix}.tmp").write_bytes(content)
        count = 0

        def replace(source: Any, target: Any, limit: int = dies_after) -> None:
            nonlocal count
            if count == limit:
                raise KeyboardInterrupt
            count += 1
            real(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                publish(folder / "a", roles=False, meta=True)
            except KeyboardInterrupt:
                assert not (folder / "a.idx").exists()
        publish(folder / "a", roles=False, meta=True)
        assert {name.removeprefix("a"): content for name, content in files(folder).items()} == new


def test_empty_data_sets_are_refused_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document was written"), IndexedWriter(tmp_path / "a", np.uint16, META):
        pass
    assert files(tmp_path) == {}
    with IndexedWriter(tmp_path / "a", np.uint16, META, allow_empty=True):
        pass
    dataset = IndexedDataset(tmp_path / "a")
    dataset.verify()
    assert (dataset.documents, len(dataset.tokens), dataset.max_token_id()) == (0, 0, -1)


def test_a_file_renamed_between_open_and_lock_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner has just finished it: writing there would destroy the data set."""
    path = tmp_path / "a.bin.tmp"
    path.write_bytes(b"finished")
    real = module.fcntl.flock

    def flock(file: Any, how: int) -> None:
        if path.exists() and path.read_bytes():
            path.rename(tmp_path / "a.bin")
        real(file, how)

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with open_exclusive(path) as file:
        file.truncate(0)
    assert files(tmp_path) == {"a.bin": b"finished", "a.bin.tmp": b""}


def test_the_last_whole_line_of_a_journal_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = Journal(path, "me")
    assert journal.entry is None
    journal.save({"n": 1})
    journal.save({"n": 2})
    with pytest.raises(ValueError, match="being written by another process"):
        Journal(path, "me")
    journal.close()
    whole = path.read_bytes()
    for torn in (b"", b'{"made_by": "me", "entr', b"\0" * 30, b"\0" * 30 + b"\n"):
        path.write_bytes(whole + torn)
        journal = Journal(path, "me")
        assert journal.entry == {"n": 2}
        journal.close()
        assert path.read_bytes() == whole
    journal = Journal(path, "you")
    assert (journal.entry, journal.abandoned) == (None, {"n": 2})
    journal.close()
    assert files(tmp_path) == {}


def test_a_journal_without_use_leaves_nothing(tmp_path: Path) -> None:
    Journal(tmp_path / "a.journal", "me").close()
    journal = Journal(tmp_path / "a.journal", "me")
    journal.save({"n": 1})
    journal.remove()
    journal.close()
    assert files(tmp_path) == {}
