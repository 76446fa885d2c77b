"""Local tensors to and from safetensors files: checks before reading, rectangles out, streams in.

Checkpoints and Hugging Face folders share this module. The library's `save_file` wants every tensor of a file in host
memory at once; `write_safetensors` holds one at a time. The library's errors name neither file nor numbers; `read_header`
does, and reads no tensor, so a truncated download is found on a login node before a job starts.

Torch is imported only where tensors are touched. Format: https://github.com/huggingface/safetensors#format
Called by: `checkpoint/`, `hf/files.py`, `hf/export.py`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from torch import Tensor, dtype

CHECKSUM = "xxh3_128"
"""The checksum that `WrittenFile` and `file_checksum` hold, by its name in the xxHash family."""

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes that weights may have: safetensors' name -> torch's."""

_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
_BYTES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
_MAX_HEADER = 100_000_000  # bytes; the library's own limit


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True)
class Entry:
    """A tensor to write: where it goes in the header, and how to get it (on any device) when its turn comes."""

    key: str
    info: TensorInfo
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and checksum of a file that is safely on disk."""

    bytes: int
    checksum: str


def dtype_name(dtype: dtype) -> str:
    """safetensors' name of a torch dtype. Raises ValueError for one that weights do not have."""
    for name, torch_name in TORCH_NAMES.items():
        if str(dtype) == f"torch.{torch_name}":
            return name
    raise ValueError(f"{dtype} is not among {', '.join(TORCH_NAMES.values())}")


def torch_dtype(name: str) -> dtype:
    """The torch dtype of one of safetensors' names in `TORCH_NAMES`."""
    import torch

    found = getattr(torch, TORCH_NAMES[name])
    assert isinstance(found, torch.dtype)
    return found


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file. Raises ValueError naming file and numbers if it is truncated or its header makes no sense."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path} is truncated or no safetensors file: {size} bytes, of which {length} for the header")
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        infos = {key: TensorInfo(str(value["dtype"]), tuple(int(n) for n in value["shape"])) for key, value in header.items()}
        spans = sorted((int(start), int(stop), key) for key, value in header.items() for start, stop in [value["data_offsets"]])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: the header of {length} bytes is damaged ({type(error).__name__}: {error})") from error
    end = 0
    for start, stop, key in spans:
        info = infos[key]
        if info.dtype not in _BYTES:
            raise ValueError(f"{path}: tensor {key} has the unknown dtype {info.dtype}")
        if start != end or stop - start != info.nbytes:
            raise ValueError(
                f"{path}: the header is damaged: tensor {key} of {info.nbytes} bytes at [{start}, {stop}), expected from {end} on"
            )
        end = stop
    if size != 8 + length + end:
        what = "is truncated" if size < 8 + length + end else "has bytes after its last tensor"
        raise ValueError(f"{path} {what}: {size} bytes, its header says {8 + length + end}")
    return infos


class SafetensorsFile:
    """Reads rectangles of the tensors of one file. The header is checked at once, the file mapped at the first read.

    Raises ValueError like `read_header`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.infos = read_header(path)

    @cached_property
    def _handle(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.path, framework="pt", device="cpu")

    def read(self, key: str, slices: tuple[slice, ...]) -> Tensor:
        """The values at `slices` of tensor `key`, in the file's dtype, as a contiguous CPU tensor of the caller's own."""
        import torch

        # The library returns a view of the mapped file: writing to it would change what is read next.
        view = self._handle.get_slice(key)[slices]
        assert isinstance(view, torch.Tensor)
        return view.clone(memory_format=torch.contiguous_format)


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> WrittenFile:
    """Write a safetensors file, holding one tensor in host memory at a time, and fsync it.

    Args:
        entries: wide dtypes go first, so that every tensor is aligned; otherwise their order is kept.
        metadata: strings for the header's `__metadata__`.
        progress: called with the number of bytes of each tensor when it is written.

    Raises ValueError if a loaded tensor is not what its entry announced, or if two entries have one key.
    """
    entries = sorted(entries, key=lambda entry: -_BYTES[entry.info.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        if entry.key in header:
            raise ValueError(f"{path}: two tensors have the key {entry.key}")
        span = [offset, offset + entry.info.nbytes]
        header[entry.key] = {"dtype": entry.info.dtype, "shape": list(entry.info.shape), "data_offsets": span}
        offset = span[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > _MAX_HEADER:
        raise ValueError(f"{path}: a header of {len(raw)} bytes for {len(entries)} tensors; readers accept {_MAX_HEADER} at most")
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        for chunk in (len(raw).to_bytes(8, "little"), raw):
            file.write(chunk)
            digest.update(chunk)
        for entry in entries:
            data = _bytes_of(entry)
            file.write(data)
            digest.update(data)
            if progress is not None:
                progress(len(data))
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(8 + len(raw) + offset, digest.hexdigest())


def _bytes_of(entry: Entry) -> memoryview:
    """The entry's tensor in row-major order as bytes; little-endian, as is every machine that torch supports."""
    import torch

    tensor = entry.load().detach()
    if dtype_name(tensor.dtype) != entry.info.dtype or tuple(tensor.shape) != entry.info.shape:
        raise ValueError(
            f"tensor {entry.key} is {tensor.dtype} {tuple(tensor.shape)}, announced were {entry.info.dtype} {entry.info.shape}"
        )
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_bytes(path: Path, data: bytes) -> WrittenFile:
    """Write a small file and fsync it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(len(data), xxhash.xxh3_128_hexdigest(data))


def file_checksum(path: Path) -> str:
    """`CHECKSUM` of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """fsync a folder: the names of the files made in it, renamed or removed survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
