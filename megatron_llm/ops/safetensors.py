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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from megatron_llm.ops.storage import BLOCK_BYTES, Folder, ReadFile, Sink
from megatron_llm.ops.tensor_file import DTYPE_BYTES, Place, TensorFile, TensorInfo, dtype_name

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM = "xxh3_128"
"""The checksum that `WrittenFile` and `file_checksum` hold, by its name in the xxHash family."""

_MAX_HEADER = 100_000_000  # bytes; the library's own limit


@dataclass(frozen=True)
class Entry:
    """A tensor to write: where it goes in the header, and how to get it (on any device) when its turn comes.

    load: the tensor, or parts of it whose elements follow each other in row-major order: then one part is in memory at a time.
    """

    key: str
    info: TensorInfo
    load: Callable[[], Tensor | Iterable[Tensor]]


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and checksum of a file that is safely on disk."""

    bytes: int
    checksum: str


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
        if info.dtype not in DTYPE_BYTES:
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


class SafetensorsFile(TensorFile):
    """The tensors of a safetensors file. Raises ValueError like `read_header`."""

    def __init__(self, file: ReadFile):
        layout = _read_layout(file)
        infos = {key: info for key, (info, _) in layout.items()}
        super().__init__(file, infos, {key: Place(start, _strides(infos[key])) for key, (_, start) in layout.items()})


def _strides(info: TensorInfo) -> tuple[int, ...]:
    """Bytes from one element to the next along each dim of a row-major tensor."""
    return tuple(DTYPE_BYTES[info.dtype] * math.prod(info.shape[dim + 1 :]) for dim in range(len(info.shape)))


def write_safetensors(
    sink: Sink,
    entries: Sequence[Entry],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> WrittenFile:
    """Write a safetensors file, holding one tensor, or one part of it, in host memory at a time.

    Args:
        sink: where it goes, empty.
        entries: wide dtypes go first, so that every tensor is aligned; otherwise their order is kept.
        metadata: strings for the header's `__metadata__`.
        progress: called with the number of bytes of each piece that is written.

    Raises ValueError if a loaded tensor is not what its entry announced, or if two entries have one key.
    """
    entries = sorted(entries, key=lambda entry: -DTYPE_BYTES[entry.info.dtype])
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
        for data in _parts(entry):
            for start in range(0, len(data), BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES]
                sink.write(block)
                digest.update(block)
                if progress is not None:
                    progress(len(block))
    return WrittenFile(8 + len(raw) + offset, digest.hexdigest())


def _parts(entry: Entry) -> Iterator[memoryview]:
    """The entry's tensor in row-major order as bytes; little-endian, as is every machine that torch supports."""
    import torch

    loaded = entry.load()
    whole, found = isinstance(loaded, torch.Tensor), 0
    for part in [loaded] if isinstance(loaded, torch.Tensor) else loaded:
        if dtype_name(part.dtype) != entry.info.dtype or (whole and tuple(part.shape) != entry.info.shape):
            raise ValueError(
                f"tensor {entry.key} is {part.dtype} {tuple(part.shape)}, announced were {entry.info.dtype} {entry.info.shape}"
            )
        data = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        found += len(data)
        yield data
    if found != entry.info.nbytes:
        raise ValueError(f"tensor {entry.key} has {found} bytes, announced were {entry.info.nbytes}")


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
