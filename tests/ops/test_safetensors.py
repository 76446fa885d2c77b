"""The streaming safetensors writer and the header check, against the safetensors library."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_llm.ops.safetensors import Entry, SafetensorsFile, WrittenFile, file_checksum, read_header, write_safetensors
from megatron_llm.ops.storage import LocalFolder, ReadFile
from megatron_llm.ops.tensor_file import TensorInfo, dtype_name, torch_dtype

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _entry(key: str, tensor: torch.Tensor) -> Entry:
    return Entry(key, TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape)), lambda: tensor)


def _write(path: Path, *args: Any) -> WrittenFile:
    with LocalFolder(path.parent).create(path.name) as sink:
        return write_safetensors(sink, *args)


def _open(path: Path) -> ReadFile:
    return LocalFolder(path.parent).open(path.name)


def _tensors() -> dict[str, torch.Tensor]:
    """Odd sizes in every dtype, narrow ones first, strided, empty and scalar ones too."""
    torch.manual_seed(0)
    tensors = {f"{dtype}.{n}": torch.randn(n, 3).to(dtype) for dtype in reversed(DTYPES) for n in (1, 5)}
    strided = torch.randn(7, 6)[1:6:2, ::2]
    return {
        **tensors,
        "strided": strided,
        "transposed": torch.randn(4, 3).t(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }


def test_written_files_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors, path, progress = _tensors(), tmp_path / "a.safetensors", list[int]()
    written = _write(path, [_entry(key, value) for key, value in tensors.items()], {"format": "pt"}, progress.append)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype and torch.equal(loaded[key], tensor), key
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    content = path.read_bytes()
    assert (written.bytes, written.checksum) == (len(content), xxhash.xxh3_128_hexdigest(content))
    assert file_checksum(_open(path)) == written.checksum
    assert sum(progress) == sum(tensor.nbytes for tensor in tensors.values())


def test_every_tensor_starts_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _write(path, [_entry(key, value) for key, value in _tensors().items()])
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    position = 8 + header
    for info in read_header(_open(path)).values():  # in the order of the file
        assert info.nbytes == 0 or position % torch_dtype(info.dtype).itemsize == 0
        position += info.nbytes


def test_one_tensor_at_a_time_is_alive(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def load() -> torch.Tensor:
        nonlocal most
        tensor = torch.zeros(100)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    _write(tmp_path / "a", [Entry(str(n), TensorInfo("F32", (100,)), load) for n in range(20)])
    assert len(alive) == 20 and most <= 2  # the one being written is released when the next is there


def test_headers_of_the_library_are_read(tmp_path: Path) -> None:
    tensors = {**_tensors(), "bytes": torch.zeros(3, dtype=torch.uint8), "long": torch.zeros(2, dtype=torch.int64)}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, tmp_path / "a", {"some": "metadata"})
    infos = read_header(_open(tmp_path / "a"))
    assert {key: info.shape for key, info in infos.items()} == {key: tuple(value.shape) for key, value in tensors.items()}
    assert {key: info.nbytes for key, info in infos.items()} == {key: value.nbytes for key, value in tensors.items()}


def test_rectangles_are_the_callers_own(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    save_file({"a": tensor}, tmp_path / "f")
    file = SafetensorsFile(_open(tmp_path / "f"))
    box = file.read("a", (slice(1, 3), slice(2, 5)))
    assert torch.equal(box, tensor[1:3, 2:5]) and box.is_contiguous()
    box.fill_(-1)
    assert torch.equal(file.read("a", (slice(0, 4), slice(0, 6))), tensor)
    assert torch.equal(load_file(tmp_path / "f")["a"], tensor)


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    info = TensorInfo("F32", (2, 3))
    for tensor in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"tensor a is .*, announced were F32 \(2, 3\)"):
            _write(tmp_path / "f", [Entry("a", info, lambda tensor=tensor: tensor)])
    with pytest.raises(ValueError, match="two tensors have the key a"):
        _write(tmp_path / "f", [_entry("a", torch.zeros(1)), _entry("a", torch.zeros(1))])
    with pytest.raises(ValueError, match="torch.int64 is not among"):
        dtype_name(torch.int64)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', "header of .* is damaged"),
        (b"[1]", "is damaged"),
        (b'{"a":{"dtype":"F32","shape":[2]}}', "is damaged .KeyError"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}}', "is damaged"),
        (b'{"a":{"dtype":"F32","shape":"x","data_offsets":[0,8]}}', "is damaged"),
        (b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}', "unknown dtype F99"),
        (b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', r"a of 12 bytes at \[0, 8\)"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "expected from 0 on"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "bytes after its last tensor"),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "is truncated: 71 bytes, its header says 79"),
    ],
)
def test_damaged_headers_are_refused_by_name(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=message) as caught:
        read_header(_open(path))
    assert str(path) in str(caught.value)
