"""Files of `torch.save`, such as `pytorch_model.bin`: what tensors they hold and where, without running anything they say.

torch.load maps or reads such a file as a whole. This finds the bytes of every tensor instead, so that a rank reads its own. Two
forms are known. Since torch 1.6 a file is a zip that is not compressed: `NAME/data.pkl` describes the tensors, `NAME/data/KEY`
are the storages that they lie in. Before, it was five pickles in a row (magic number, version, machine, tensors, keys of
storages) and then each storage behind the number of its elements.

A pickle names functions to call. Here every name that a file of tensors contains leads to a record of ours that keeps what it is
given, and any other is refused. Torch-free. Called by `hf/files.py`.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

from megatron_llm.ops.storage import ReadFile
from megatron_llm.ops.tensor_file import DTYPE_BYTES, Place, TensorFile, TensorInfo

_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = 30  # bytes in front of the name of a zip's member
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_DAMAGED = (
    pickle.UnpicklingError, zipfile.BadZipFile, ValueError, TypeError, AttributeError, KeyError, IndexError, EOFError,
    OverflowError, RecursionError, NotImplementedError,
)  # fmt: skip


class RefusedName(Exception):
    """A pickle asks for something that no file of tensors contains."""


@dataclass(frozen=True)
class _Storage:
    """A run of elements under a key; a tensor in it begins at `first` plus its own offset."""

    dtype: str
    key: str
    count: int
    first: int = 0


@dataclass(frozen=True)
class _Tensor:
    """A tensor inside a storage, in elements."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuilt(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """torch's _rebuild_tensor and _rebuild_tensor_v2; requires_grad and hooks follow."""
    return _Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuilt_typed(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: str, *_: Any
) -> _Tensor:
    """torch's _rebuild_tensor_v3, for dtypes that have no storage class."""
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _unwrapped(tensor: _Tensor, *_: Any) -> _Tensor:
    """torch's _rebuild_parameter, with and without attributes."""
    return tensor


def _called(function: Callable[..., _Tensor], kind: Any, arguments: tuple[Any, ...], state: Any) -> _Tensor:
    """torch's _rebuild_from_type_v2, for parameters and tensors that somebody has given attributes."""
    return function(*arguments)


_NAMES: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch.Size": tuple,
    "torch.Tensor": "tensor",
    "torch.nn.parameter.Parameter": "parameter",
    "torch._utils._rebuild_tensor": _rebuilt,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_tensor_v3": _rebuilt_typed,
    "torch._utils._rebuild_parameter": _unwrapped,
    "torch._utils._rebuild_parameter_with_state": _unwrapped,
    "torch._tensor._rebuild_from_type_v2": _called,
    "torch.storage.UntypedStorage": "U8",
    **{f"torch.{name}": dtype for name, dtype in (_STORAGES | _DTYPES).items()},
}


class _Unpickler(pickle.Unpickler):
    """Makes numbers, strings, containers and the records above, and calls nothing else. Keeps every storage that is named."""

    def __init__(self, stream: IO[bytes]):
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        if qualified not in _NAMES:
            raise RefusedName(qualified)
        return _NAMES[qualified]

    def persistent_load(self, pid: Any) -> _Storage:
        what, dtype, key, _, count, *view = pid
        if what != "storage" or dtype not in DTYPE_BYTES:
            raise pickle.UnpicklingError(f"{pid!r} is no storage")
        root = _Storage(dtype, str(key), int(count))
        self.storages[root.key] = root
        if not view or view[0] is None:
            return root
        _, first, length = view[0]  # before torch 0.4 a storage could be part of another
        return _Storage(dtype, root.key, int(length), int(first))


class _Stream(io.RawIOBase):
    """A file for whoever wants to seek and read."""

    def __init__(self, file: ReadFile):
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        if self._at < 0:
            raise OSError("before the beginning")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer)[: max(0, self._file.size - self._at)]
        self._file.read(self._at, into)
        self._at += len(into)
        return len(into)


class TorchFile(TensorFile):
    """The tensors of a file. Raises ValueError naming it if it is damaged, or holds anything but a dictionary of tensors."""

    def __init__(self, file: ReadFile):
        try:
            zipped = file.size >= len(_ZIP) and file.bytes(0, len(_ZIP)) == _ZIP
            content, starts = (_read_zip if zipped else _read_row)(file)
            tensors = _tensors(content)
            places = {key: _place(tensor, starts[tensor.storage.key]) for key, tensor in tensors.items()}
        except RefusedName as error:
            raise ValueError(
                f"{file.path} asks for {error}, which is no part of a file of tensors and could run code; nothing was executed. "
                "Save the tensors alone, as safetensors, where you trust the file"
            ) from None
        except (*_DAMAGED, OSError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{file.path} is truncated or not a plain file of tensors ({file.size} bytes; {reason})") from error
        super().__init__(file, {key: TensorInfo(tensor.dtype, tensor.shape) for key, tensor in tensors.items()}, places)


def _tensors(content: Any) -> dict[str, _Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not a dictionary of tensors")
    others = [f"{key!r} is a {type(value).__name__}" for key, value in content.items() if not isinstance(value, _Tensor)]
    if others:
        raise ValueError(f"{others[0]}, not a tensor")
    return {str(key): value for key, value in content.items()}


def _place(tensor: _Tensor, start: int) -> Place:
    """The tensor's place in the file, whose storage starts there. Raises ValueError if it reaches out of its storage."""
    size, storage = DTYPE_BYTES[tensor.dtype], tensor.storage
    strides = tensor.strides
    if len(strides) != len(tensor.shape) or any(n < 0 for n in (*tensor.shape, *strides, tensor.offset, storage.first)):
        raise ValueError(f"a tensor of shape {tensor.shape} has strides {strides} and offset {tensor.offset}")
    end = sum((count - 1) * stride for count, stride in zip(tensor.shape, strides, strict=True)) + tensor.offset + 1
    if math.prod(tensor.shape) and end * size > storage.count * DTYPE_BYTES[storage.dtype]:
        raise ValueError(f"a tensor of shape {tensor.shape} reaches out of its storage of {storage.count} elements")
    first = start + storage.first * DTYPE_BYTES[storage.dtype] + tensor.offset * size
    return Place(first, tuple(stride * size for stride in strides))


def _read_zip(file: ReadFile) -> tuple[Any, dict[str, int]]:
    """The pickled object, and the byte at which each storage starts."""
    with zipfile.ZipFile(cast("IO[bytes]", _Stream(file))) as archive:
        members = {member.filename: member for member in archive.infolist()}
        described = min((name for name in members if name.rpartition("/")[2] == "data.pkl"), key=len, default=None)
        if described is None:
            raise ValueError("a zip without data.pkl")
        folder = described.removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        unpickler = _Unpickler(io.BytesIO(archive.read(described)))
        content = unpickler.load()
    starts = {}
    for key, storage in unpickler.storages.items():
        member = members[f"{folder}data/{key}"]
        wanted = storage.count * DTYPE_BYTES[storage.dtype]
        if member.compress_type != zipfile.ZIP_STORED or member.file_size < wanted:
            raise ValueError(f"storage {key} has {member.file_size} bytes, expected {wanted} that are not compressed")
        header = file.bytes(member.header_offset, member.header_offset + _LOCAL_HEADER)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        starts[key] = member.header_offset + _LOCAL_HEADER + names
        if starts[key] + wanted > file.size:
            raise ValueError(f"storage {key} reaches beyond the end")
    return content, starts


def _read_row(file: ReadFile) -> tuple[Any, dict[str, int]]:
    """The same of the form before torch 1.6."""
    stream = io.BufferedReader(_Stream(file))
    if _Unpickler(stream).load() != _MAGIC:
        raise ValueError("torch.save has not written it, or a torch older than 0.2")
    _Unpickler(stream).load()  # the version of the format; there was one
    if not _Unpickler(stream).load()["little_endian"]:
        raise ValueError("its numbers are big-endian")
    unpickler = _Unpickler(stream)
    content, keys = unpickler.load(), _Unpickler(stream).load()
    at, starts = stream.tell(), {}
    for key in keys:
        storage = unpickler.storages[str(key)]
        if int.from_bytes(file.bytes(at, at + 8), "little") != storage.count:
            raise ValueError(f"storage {key} has not the {storage.count} elements that it should have")
        starts[storage.key] = at + 8
        at += 8 + storage.count * DTYPE_BYTES[storage.dtype]
    if at > file.size:
        raise ValueError(f"its storages need {at} bytes")
    return content, starts
