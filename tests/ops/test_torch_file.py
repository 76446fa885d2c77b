"""Files of torch.save, in both of its forms: every rectangle is what torch.load gives, by exact reads; nothing in them is run."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_llm.ops.storage import LocalFolder, ReadFile
from megatron_llm.ops.torch_file import TorchFile

FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])


def tensors() -> dict[str, Tensor]:
    """Storages that are shared, strided, expanded, empty; parameters; numbers; buffers of other dtypes."""
    whole = torch.randn(4, 6, 5)
    named = torch.nn.Parameter(whole.clone())
    named.attribute = "what Megatron and DeepSpeed do"  # type: ignore[attr-defined]
    return OrderedDict(
        whole=whole,
        shared=whole.transpose(0, 2),
        strided=whole[1:3, ::2, 1:],
        expanded=whole[:1].expand(4, 6, 5),
        own=torch.randn(7, 3, dtype=torch.float64).t(),
        bfloat=torch.randn(9).bfloat16(),
        half=torch.randn(3, 1, 2).half(),
        parameter=torch.nn.Parameter(whole.clone()),
        named=named,
        number=torch.tensor(2.5),
        empty=torch.zeros(0, 4),
        ids=torch.arange(3),
        mask=torch.ones(2, 2, dtype=torch.bool),
    )


def write(path: Path, content: Any, zipped: bool = True) -> ReadFile:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return LocalFolder(path.parent).open(path.name)


@FORMS
def test_every_rectangle_is_what_torch_loads(tmp_path: Path, zipped: bool) -> None:
    file = TorchFile(write(tmp_path / "x.bin", tensors(), zipped))
    loaded = torch.load(tmp_path / "x.bin", weights_only=True)
    assert list(file.infos) == list(loaded)
    assert (file.infos["ids"].dtype, file.infos["mask"].dtype, file.infos["own"].dtype) == ("I64", "BOOL", "F64")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in loaded.items():
        assert file.infos[name].shape == tensor.shape
        if not tensor.is_floating_point():
            continue
        for _ in range(20):
            starts = [int(torch.randint(0, size + 1, (), generator=generator)) for size in tensor.shape]
            ends = [int(torch.randint(s, n + 1, (), generator=generator)) for s, n in zip(starts, tensor.shape, strict=True)]
            box = tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))
            values = file.read(name, box)
            assert values.dtype == tensor.dtype and values.is_contiguous()
            assert torch.equal(values, tensor[box])
            values.fill_(9.0)  # the caller's own
        assert torch.equal(file.read(name, tuple(slice(0, size) for size in tensor.shape)), tensor)


@FORMS
def test_the_state_of_a_module_has_versions_beside_it(tmp_path: Path, zipped: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    file = TorchFile(write(tmp_path / "x.bin", module.state_dict(), zipped))
    assert torch.equal(file.read("0.weight", (slice(0, 2), slice(0, 3))), module[0].weight)


@FORMS
def test_reads_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    stored = {"a": torch.randn(300, 200), "b": torch.randn(1000)}
    opened = write(tmp_path / "x.bin", stored, zipped)
    reads: list[int] = []
    plain = type(opened).read
    monkeypatch.setattr(type(opened), "read", lambda self, start, into: (reads.append(len(into)), plain(self, start, into))[1])
    file = TorchFile(opened)
    assert sum(reads) < 10_000, "opening a file of 244 kB"
    reads.clear()
    file.read("a", (slice(10, 20), slice(0, 200)))
    assert reads == [10 * 200 * 4]
    reads.clear()
    file.read("a", (slice(0, 300), slice(50, 60)))
    assert reads == [40] * 300


class Evil:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


@FORMS
def test_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    file = write(tmp_path / "x.bin", {"a": torch.zeros(2), "b": Evil(str(tmp_path / "executed"))}, zipped)
    with pytest.raises(ValueError, match=r"x.bin asks for .*open, which is no part of a file of tensors and could run code"):
        TorchFile(file)
    assert not (tmp_path / "executed").exists()
    pickled = pickle.dumps(Evil(str(tmp_path / "executed")))  # no torch file at all
    (tmp_path / "y.bin").write_bytes(pickled)
    with pytest.raises(ValueError, match="nothing was executed"):
        TorchFile(LocalFolder(tmp_path).open("y.bin"))
    assert not (tmp_path / "executed").exists()


@FORMS
@pytest.mark.parametrize("keep", [0, 3, 100, 700, -1, -200, -1500])
def test_truncated_files_are_named(tmp_path: Path, zipped: bool, keep: int) -> None:
    write(tmp_path / "x.bin", {"a": torch.randn(20, 20), "b": torch.randn(50)}, zipped)
    content = (tmp_path / "x.bin").read_bytes()[:keep]
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x.bin is truncated or not a plain file of tensors \({len(content)} bytes; "):
        TorchFile(LocalFolder(tmp_path).open("x.bin"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.zeros(2)], "it holds a list, not a dictionary of tensors"),
        ({"model": {"a": torch.zeros(2)}}, "'model' is a dict, not a tensor"),
        ({"a": torch.zeros(2), "step": 3}, "'step' is a int, not a tensor"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    for zipped in (True, False):
        with pytest.raises(ValueError, match=reason):
            TorchFile(write(tmp_path / "x.bin", content, zipped))


def test_tensors_that_reach_out_of_their_storage_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.bin", {"a": torch.zeros(5, 3)})
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for old, new, reason in (
        (b"K\x05K\x03\x86", b"K\x06K\x03\x86", "reaches out"),
        (b"K\x0f", b"K\x40", "has 60 bytes, expected 256"),
    ):
        with zipfile.ZipFile(tmp_path / "y.bin", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)
        with pytest.raises(ValueError, match=reason):
            TorchFile(LocalFolder(tmp_path).open("y.bin"))


def test_compressed_and_foreign_zips_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.bin", {"a": torch.zeros(5, 3)})
    with zipfile.ZipFile(tmp_path / "x.bin") as archive, zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    with pytest.raises(ValueError, match="not compressed"):
        TorchFile(LocalFolder(tmp_path).open("y.bin"))
    with zipfile.ZipFile(tmp_path / "z.bin", "w") as other:
        other.writestr("readme", b"hello")
    with pytest.raises(ValueError, match="a zip without data.pkl"):
        TorchFile(LocalFolder(tmp_path).open("z.bin"))
