"""Folders of every kind do the same: local ones, and what fsspec reaches (its memory and its local file system)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.ops.safetensors import Entry, SafetensorsFile, file_checksum, write_bytes, write_safetensors
from megatron_llm.ops.storage import BLOCK_BYTES, Folder, LocalFolder, ReadFile, open_folder
from megatron_llm.ops.tensor_file import TensorInfo


class Elsewhere(LocalFileSystem):
    """A file system that is not known to be local."""

    protocol = "storage-test"


fsspec.register_implementation("storage-test", Elsewhere, clobber=True)


@pytest.fixture(params=["local", "memory", "norename"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    places = {
        "local": str(tmp_path / "top"),
        "memory": f"memory://{tmp_path.name}/top",
        "norename": f"storage-test://{tmp_path}/top",
    }
    return open_folder(places[request.param])


def test_files_come_and_go(folder: Folder) -> None:
    assert folder.names() == [] and folder.files() == {}
    child = folder.child("a").child("b")
    child.make()
    child.make()
    assert write_bytes(child, "x", b"123").bytes == 3
    write_bytes(child, "x", b"4567")  # replaced
    write_bytes(child, "deep/er/y", b"")
    child.commit("z", b"whole")
    assert child.names() == ["deep", "x", "z"] and child.files() == {"x": 4, "z": 5, "deep/er/y": 0}
    assert folder.names() == ["a"] and str(child.parent()) == f"{folder}/a"
    assert child.read_bytes("x") == b"4567" and child.open("x").bytes(1, 3) == b"56"
    with pytest.raises(FileNotFoundError):
        child.open("absent")
    child.remove("absent")
    child.remove("x")
    assert "x" not in child.names()
    folder.child("a").delete()
    folder.child("a").delete()
    assert folder.names() == []


def test_large_files_are_written_and_read_in_blocks(folder: Folder) -> None:
    folder.make()
    data = os.urandom(2 * BLOCK_BYTES + 5)
    written = write_bytes(folder, "large", data)
    file = folder.open("large")
    counted: list[int] = []
    assert file.size == len(data) and file.name == "large" and file.path == f"{folder}/large"
    assert file_checksum(file, counted.append) == written.checksum and sum(counted) == len(data)
    assert file.bytes(BLOCK_BYTES - 3, 2 * BLOCK_BYTES + 3) == data[BLOCK_BYTES - 3 : 2 * BLOCK_BYTES + 3]


def test_a_file_that_is_cut_off_while_it_is_read_is_named(folder: Folder) -> None:
    folder.make()
    write_bytes(folder, "f", b"0123456789")
    file = folder.open("f")
    write_bytes(folder, "f", b"012")
    with pytest.raises(ValueError, match="/f was cut off while it was read: no 4 bytes at 2 of what were 10"):
        file.bytes(2, 6)


def test_a_write_that_fails_is_not_called_complete(folder: Folder) -> None:
    folder.make()
    with pytest.raises(RuntimeError), folder.create("f") as sink:
        sink.write(b"1")
        raise RuntimeError("planted")


def test_places_that_cannot_be_used_say_why() -> None:
    with pytest.raises(ValueError, match="nowhere://x cannot be used: Protocol not known: nowhere"):
        open_folder("nowhere://x")
    with pytest.raises(ValueError, match="s3://bucket/run: s3:// needs a package that is not installed .*s3fs"):
        open_folder("s3://bucket/run")  # a data set library may bring it one day
    assert isinstance(open_folder("a/b"), LocalFolder) and str(open_folder("file:///a/b")) == "/a/b"


class Counted(ReadFile):
    """A file that counts what is read of it."""

    def __init__(self, inner: ReadFile):
        super().__init__(inner.path, inner.size)
        self.seeks, self.inner = inner.seeks, inner
        self.reads: list[int] = []

    def read(self, start: int, into: memoryview) -> None:
        self.reads.append(len(into))
        self.inner.read(start, into)


def _stored(folder: Folder, tensor: torch.Tensor) -> tuple[SafetensorsFile, Counted]:
    folder.make()
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
    with folder.create("t") as sink:
        write_safetensors(sink, [Entry("t", TensorInfo(dtype, tuple(tensor.shape)), lambda: tensor)])
    counted = Counted(folder.open("t"))
    file = SafetensorsFile(counted)
    counted.reads.clear()
    return file, counted


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_rectangle_is_read_and_of_a_local_file_not_a_byte_more(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    tensor = torch.randn(shape).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    slices = tuple(slice(start, data.draw(st.integers(start, size))) for start, size in zip(starts, shape, strict=True))
    for seeks in (True, False):
        file, counted = _stored(open_folder("memory://rectangles"), tensor)
        counted.seeks = seeks
        read = file.read("t", slices)
        assert torch.equal(read, tensor[slices]) and read.dtype is tensor.dtype and read.is_contiguous()
        if seeks:
            assert sum(counted.reads) == read.nbytes
        else:
            assert sum(counted.reads) <= tensor.nbytes


def test_columns_of_a_remote_file_are_cut_out_of_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_llm.ops.tensor_file.BLOCK_BYTES", 1000)
    tensor = torch.randn(50, 30)  # rows of 120 bytes
    file, counted = _stored(open_folder("memory://columns"), tensor)
    assert torch.equal(file.read("t", (slice(3, 48), slice(10, 12))), tensor[3:48, 10:12])
    assert counted.reads == [7 * 120 + 8] * 5 + [4 * 120 + 8]  # 45 rows, 8 at a time


class Broken(LocalFileSystem):
    """Every call fails as some library would."""

    protocol = "broken-test"

    def __getattribute__(self, name: str) -> Any:
        if name in ("ls", "find", "cat_file", "info", "open", "pipe_file", "makedirs", "rm", "rm_file"):
            raise RuntimeError("Access Denied")
        return super().__getattribute__(name)


fsspec.register_implementation("broken-test", Broken, clobber=True)


def test_whatever_a_file_system_raises_says_where() -> None:
    folder = open_folder("broken-test:///bucket/run")
    calls: list[Callable[[], object]] = [
        folder.names, folder.files, folder.make, folder.delete, lambda: folder.open("f"), lambda: folder.commit("f", b""),
        lambda: folder.remove("f"), lambda: write_bytes(folder, "f", b""),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(OSError, match="cannot be used: RuntimeError: Access Denied") as caught:
            call()
        assert str(caught.value.filename).startswith("broken-test:///bucket/run")
