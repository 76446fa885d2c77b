"""A file of tensors that are known before they are read, and rectangles out of it: what every format of weights shares.

Mapping a file would count what was read as memory of the process, cannot be done with an object store, and tells nobody how much
was read. Torch is imported only where values are. Base of `safetensors.py` and `torch_file.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_llm.ops.storage import BLOCK_BYTES, ReadFile

if TYPE_CHECKING:
    from torch import Tensor, dtype

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes that weights may have: safetensors' name -> torch's."""

DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
DTYPE_BYTES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
"""safetensors' name of every dtype -> bytes of an element."""


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file: the byte of its first element, and the bytes between elements along each dim."""

    start: int
    strides: tuple[int, ...]


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


class TensorFile:
    """Reads rectangles of the tensors of one file, and no byte more where small reads cost nothing.

    Attributes:
        infos: every tensor of the file.
    """

    def __init__(self, file: ReadFile, infos: Mapping[str, TensorInfo], places: Mapping[str, Place]):
        self._file, self.infos, self._places = file, infos, places

    @property
    def path(self) -> str:
        return self._file.path

    @property
    def name(self) -> str:
        return self._file.name

    def read(self, key: str, slices: tuple[slice, ...]) -> Tensor:
        """The values at `slices` (of known ends) of tensor `key`, in the file's dtype, as a contiguous CPU tensor."""
        import torch

        info, place = self.infos[key], self._places[key]
        sizes = [part.stop - part.start for part in slices]
        start = place.start + sum(part.start * stride for part, stride in zip(slices, place.strides, strict=True))
        stored = [size if stride else 1 for size, stride in zip(sizes, place.strides, strict=True)]  # 0: all are one element
        order = sorted(range(len(sizes)), key=lambda dim: -place.strides[dim])  # as the file has them
        values = torch.empty([stored[dim] for dim in order], dtype=torch_dtype(info.dtype))
        if math.prod(sizes):
            data = values.reshape(-1).view(torch.uint8).numpy().data
            self._read_rectangle(start, [stored[dim] for dim in order], [place.strides[dim] for dim in order], data)
        back = [order.index(dim) for dim in range(len(sizes))]
        return values.permute(back).expand(sizes).contiguous()

    def _read_rectangle(self, start: int, sizes: Sequence[int], strides: Sequence[int], data: memoryview) -> None:
        """Fill `data`. Elements are back to back in the file as long as all later dims are whole."""
        run, inner = len(data) // math.prod(sizes), len(sizes)
        while inner and (sizes[inner - 1] == 1 or strides[inner - 1] == run):
            inner -= 1
            run *= sizes[inner]
        if not inner:
            self._file.read(start, data)
            return
        filled, rows = 0, sizes[inner - 1]
        for outer in itertools.product(*(range(size) for size in sizes[: inner - 1])):
            at = start + sum(index * stride for index, stride in zip(outer, strides, strict=False))
            self._read_rows(at, strides[inner - 1], rows, run, data[filled : filled + rows * run])
            filled += rows * run

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
