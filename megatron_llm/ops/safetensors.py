"""Local tensors to and from safetensors files: checks before reading, rectangles out, streams in.

Checkpoints and Hugging Face folders share this module. The library's `save_file` wants every tensor of a file in host
memory at once; `write_safetensors` holds one at a time. The library's errors name neither file nor numbers; `read_header`
does, and reads no tensor, so a truncated download is found on a login node before a job starts.

Torch is imported only where tensors are touched. Format: https://github.com/huggingface/safetensors#format
Called by: `checkpoint/`, `hf/files.py`, `hf/export.py`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from megatron_llm.ops.storage import BLOCK_BYTES, Folder, ReadFile, Sink

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


def read_header(file: ReadFile) -> dict[str, TensorInfo]:
    """The tensors of a file. Raises ValueError naming file and numbers if it is truncated or its header makes no sense."""
    return {key: info for key, (info, _) in _read_layout(file).items()}


def _read_layout(file: ReadFile) -> dict[str, tuple[TensorInfo, int]]:
    """Every tensor of a file, and the byte at which it starts."""
    path, size = file.path, file.size
    length = int.from_bytes(file.bytes(0, 8), "little") if size >= 8 else 0
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"{path} is truncated or no safetensors file: {size} bytes, of which {length} for the header")
    raw = file.bytes(8, 8 + length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        infos = {key: TensorInfo(str(value["dtype"]), tuple(int(n) for n in value["shape"])) for key, value in header.items()}
        spans = sorted((int(start), int(stop), key) for key, value in header.items() for start, stop in [value["data_offsets"]])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: the header of {length} bytes is damaged ({type(error).__name__}: {error})") from error
    end = 0
    starts = {}
    for start, stop, key in spans:
        info = infos[key]
        if info.dtype not in _BYTES:
            raise ValueError(f"{path}: tensor {key} has the unknown dtype {info.dtype}")
        if start != end or stop - start != info.nbytes:
            raise ValueError(
                f"{path}: the header is damaged: tensor {key} of {info.nbytes} bytes at [{start}, {stop}), expected from {end} on"
            )
        starts[key], end = 8 + length + start, stop
    if size != 8 + length + end:
        what = "is truncated" if size < 8 + length + end else "has bytes after its last tensor"
        raise ValueError(f"{path} {what}: {size} bytes, its header says {8 + length + end}")
    return {key: (info, starts[key]) for key, info in infos.items()}


class SafetensorsFile:
    """Reads rectangles of the tensors of one file, and no byte more where small reads cost nothing.

    The library maps files, which counts what was read as memory of the process, cannot be done with an object store, and
    tells nobody how much was read. Raises ValueError like `read_header`.
    """

    def __init__(self, file: ReadFile):
        self._file = file
        layout = _read_layout(file)
        self.infos = {key: info for key, (info, _) in layout.items()}
        self._starts = {key: start for key, (_, start) in layout.items()}

    @property
    def path(self) -> str:
        return self._file.path

    @property
    def name(self) -> str:
        return self._file.name

    def read(self, key: str, slices: tuple[slice, ...]) -> Tensor:
        """The values at `slices` (of known ends) of tensor `key`, in the file's dtype, as a contiguous CPU tensor."""
        import torch

        info = self.infos[key]
        values = torch.empty([part.stop - part.start for part in slices], dtype=torch_dtype(info.dtype))
        if values.numel():
            data = values.reshape(-1).view(torch.uint8).numpy().data
            self._read_rectangle(self._starts[key], info, slices, data)
        return values

    def _read_rectangle(self, start: int, info: TensorInfo, slices: tuple[slice, ...], data: memoryview) -> None:
        """Fill `data` with the bytes of a rectangle that are back to back in the file as long as all later dims are whole.

        start: where the tensor begins.
        """
        strides = [_BYTES[info.dtype] * math.prod(info.shape[dim + 1 :]) for dim in range(len(info.shape))]
        sizes = [part.stop - part.start for part in slices]
        start += sum(part.start * stride for part, stride in zip(slices, strides, strict=True))
        cut = [dim for dim in range(len(sizes)) if sizes[dim] != info.shape[dim]]
        inner = cut[-1] if cut else 0  # the last dim that is not whole: it and what is in it are a run of bytes
        runs = math.prod(sizes[:inner])
        if runs == 1:
            self._file.read(start, data)
            return
        run, filled = len(data) // runs, 0
        for outer in itertools.product(*(range(size) for size in sizes[: inner - 1])):
            at = start + sum(index * stride for index, stride in zip(outer, strides, strict=False))
            self._read_rows(at, strides[inner - 1], sizes[inner - 1], run, data[filled : filled + sizes[inner - 1] * run])
            filled += sizes[inner - 1] * run

    def _read_rows(self, start: int, stride: int, rows: int, run: int, data: memoryview) -> None:
        """Fill `data` with `run` bytes of each row, of which one begins every `stride` bytes."""
        if self._file.seeks:
            for row in range(rows):
                self._file.read(start + row * stride, data[row * run : (row + 1) * run])
            return
        count = max(1, BLOCK_BYTES // stride)
        for first in range(0, rows, count):
            last = min(first + count, rows) - 1
            block = bytearray((last - first) * stride + run)
            self._file.read(start + first * stride, memoryview(block))
            for row in range(first, last + 1):
                at = (row - first) * stride
                data[row * run : (row + 1) * run] = block[at : at + run]


def write_safetensors(
    sink: Sink,
    entries: Sequence[Entry],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> WrittenFile:
    """Write a safetensors file, holding one tensor in host memory at a time.

    Args:
        sink: where it goes, empty.
        entries: wide dtypes go first, so that every tensor is aligned; otherwise their order is kept.
        metadata: strings for the header's `__metadata__`.
        progress: called with the number of bytes of each piece that is written.

    Raises ValueError if a loaded tensor is not what its entry announced, or if two entries have one key.
    """
    entries = sorted(entries, key=lambda entry: -_BYTES[entry.info.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        if entry.key in header:
            raise ValueError(f"{sink.path}: two tensors have the key {entry.key}")
        span = [offset, offset + entry.info.nbytes]
        header[entry.key] = {"dtype": entry.info.dtype, "shape": list(entry.info.shape), "data_offsets": span}
        offset = span[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > _MAX_HEADER:
        raise ValueError(
            f"{sink.path}: a header of {len(raw)} bytes for {len(entries)} tensors; readers accept {_MAX_HEADER} at most"
        )
    digest = xxhash.xxh3_128()
    for chunk in (len(raw).to_bytes(8, "little"), raw):
        sink.write(chunk)
        digest.update(chunk)
    for entry in entries:
        data = _bytes_of(entry)
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            sink.write(block)
            digest.update(block)
            if progress is not None:
                progress(len(block))
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


def write_bytes(folder: Folder, name: str, data: bytes) -> WrittenFile:
    """Write a small file."""
    with folder.create(name) as sink:
        sink.write(data)
    return WrittenFile(len(data), xxhash.xxh3_128_hexdigest(data))


def file_checksum(file: ReadFile, progress: Callable[[int], object] | None = None) -> str:
    """`CHECKSUM` of a file's bytes. progress: called with the number of bytes of each piece that is read."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(file.size, BLOCK_BYTES if not file.seeks else 1 << 22)))  # local: stays in the cache
    for start in range(0, file.size, max(1, len(buffer))):
        block = buffer[: file.size - start]
        file.read(start, block)
        digest.update(block)
        if progress is not None:
            progress(len(block))
    return digest.hexdigest()
