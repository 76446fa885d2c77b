"""A megatron-core `torch_dist` folder: which tensors it holds, and their rectangles, read from the bytes that hold them.

    iter_0000100/ .metadata       pickle: key -> dtype, shape, chunks; (key, offset of the chunk) -> file, offset, length
                  __R_N.distcp    torch.save of one chunk after another; R: rank that wrote it, N: its thread
                  common.pt       torch.save of a dictionary: args of the run, iteration
                  metadata.json   {"sharded_backend": "torch_dist", ...}, written last: without it the save was interrupted
    latest_checkpointed_iteration.txt   beside the iterations: the number of the newest one, or `release`

This is torch.distributed.checkpoint's file format; nothing of megatron is needed. `source.py` gives the keys a meaning,
`export.py` writes such a folder.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_llm.exchange.pickles import Record, load_common, load_metadata
from megatron_llm.ops.tensor_file import dtype_name, torch_dtype
from megatron_llm.parallel.shard import Box

if TYPE_CHECKING:
    from torch import Tensor

METADATA = ".metadata"
COMMON = "common.pt"
CONFIG = "metadata.json"
TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, and the bytes [offset, offset + length) of the file that hold it."""

    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class ChunkedTensor:
    """A stored tensor: safetensors' name of its dtype (torch's for one that weights do not have), shape, chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def find_folder(path: str | Path) -> Path:
    """The folder of one iteration: `path` itself, or what the tracker file in it names.

    Raises ValueError saying what is missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; expected a Megatron checkpoint")
    tracker = path / TRACKER
    if (path / METADATA).exists() or (path / CONFIG).exists():
        return path
    if not tracker.is_file():
        found = sorted(inside.name for inside in path.iterdir() if inside.name.startswith(("mp_rank_", "iter_")))
        if found and found[0].startswith("mp_rank_"):
            raise ValueError(_other_format(path, "torch (one file a rank)"))
        hint = f"; name one of {', '.join(found)}" if found else ""
        raise ValueError(f"{path} has neither {METADATA} nor {TRACKER}, so it is no Megatron checkpoint{hint}")
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise ValueError(f"{tracker} must hold the number of an iteration or `release`, got {text[:40]!r}")
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise ValueError(f"{tracker} names {text}, but {folder} does not exist")
    if not (folder / METADATA).exists() and any(folder.glob("mp_rank_*")):
        raise ValueError(_other_format(folder, "torch (one file a rank)"))
    return folder


def _other_format(folder: Path, found: str) -> str:
    return f"{folder} is in Megatron's format {found}; save it again with --ckpt-convert-format torch_dist"


class TorchDistFolder:
    """One iteration's folder, its metadata read and its files looked at; tensors are read when asked for.

    Raises ValueError naming what is missing, damaged, truncated or of another format.
    """

    def __init__(self, path: str | Path):
        self.path = find_folder(path)
        self._check_format()
        file = self.path / METADATA
        if not file.is_file():
            raise ValueError(f"{file} is missing; without it nobody knows what the .distcp files hold. Copy the checkpoint again")
        metadata = load_metadata(file)
        try:
            self.tensors = _tensors(metadata)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} is no metadata that this version understands ({type(error).__name__}: {error})") from error
        self._check_files()
        self._last: tuple[tuple[str, Chunk], Tensor] | None = None

    def _check_format(self) -> None:
        file = self.path / CONFIG
        if not file.is_file():
            raise ValueError(f"{file} is missing: the checkpoint was not saved to the end")
        try:
            backend = json.loads(file.read_text(encoding="utf-8"))["sharded_backend"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({type(error).__name__}: {error})") from error
        if backend != "torch_dist":
            raise ValueError(_other_format(self.path, str(backend)))

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for tensor in self.tensors.values():
            for chunk in tensor.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.length)
        problems = []
        for name, end in sorted(ends.items()):
            path = self.path / name
            if Path(name).name != name or "\\" in name:
                problems.append(f"{self.path / METADATA}: file name {name!r} leads out of the checkpoint")
            elif not path.is_file():
                problems.append(f"{path} is missing, but {METADATA} names it; copy it again")
            elif path.stat().st_size < end:
                problems.append(
                    f"{path} is truncated: {path.stat().st_size} bytes, {METADATA} needs {end}; copy the checkpoint again"
                )
        if problems:
            raise ValueError("\n".join(problems))

    def common(self) -> dict[str, Any]:
        """What `common.pt` holds; empty if there is none. Raises ValueError like `load_common`."""
        return load_common(self.path / COMMON) if (self.path / COMMON).is_file() else {}

    def read(self, key: str, box: Box) -> Tensor:
        """Values of `box` of a tensor, a CPU tensor of `box.shape`; reads the chunks that it touches, one at a time.

        Raises ValueError naming the file if a chunk is damaged, or the chunks do not cover the box exactly.
        """
        import torch

        tensor = self.tensors[key]
        values = torch.empty(box.shape, dtype=torch_dtype(tensor.dtype))
        found = 0
        for chunk in tensor.chunks:
            common = box.intersect(chunk.box)
            if common is not None:
                read = self._load(key, tensor, chunk)
                values[common.relative_to(box).slices] = read[common.relative_to(chunk.box).slices]
                found += common.numel
        if found != box.numel:
            raise ValueError(f"{self.path}: {found} of {box.numel} elements of the box at {box.offset} of {key} are stored")
        return values

    def _load(self, key: str, tensor: ChunkedTensor, chunk: Chunk) -> Tensor:
        """A whole chunk; kept until the next one is read, as whoever reads in slabs comes back for the rest of it."""
        if self._last is None or self._last[0] != (key, chunk):
            self._last = None  # before the next one is there
            self._last = (key, chunk), self._read_chunk(key, tensor, chunk)
        return self._last[1]

    def _read_chunk(self, key: str, tensor: ChunkedTensor, chunk: Chunk) -> Tensor:
        import torch

        path = self.path / chunk.file
        where = f"{path}: {key} at {chunk.box.offset} (bytes {chunk.offset} to {chunk.offset + chunk.length})"
        with path.open("rb") as file:
            file.seek(chunk.offset)
            data = file.read(chunk.length)
        try:
            values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no one exception for a damaged file
            reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
            raise ValueError(f"{where} is damaged or no plain tensor ({reason}); copy the checkpoint again") from error
        if not isinstance(values, torch.Tensor) or values.shape != chunk.box.shape or values.dtype != torch_dtype(tensor.dtype):
            found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(f"{where} is {found}, {METADATA} says {tensor.dtype} {chunk.box.shape}")
        return values


def _tensors(metadata: Record) -> dict[str, ChunkedTensor]:
    """Every tensor of the metadata by its key; entries of bytes (`_extra_state`, random states) are left out."""
    stored: dict[tuple[str, tuple[int, ...] | None], Record] = {}
    for index, info in metadata["storage_data"].items():
        offset = index.state.get("offset")
        stored[index["fqn"], None if offset is None else tuple(offset)] = info
    tensors = {}
    for key, entry in metadata["state_dict_metadata"].items():
        if type(entry).__name__ == "TensorStorageMetadata":
            chunks = tuple(_chunk(key, chunk, stored) for chunk in entry["chunks"])
            tensors[key] = ChunkedTensor(_dtype(entry["properties"]), tuple(entry["size"]), chunks)
    return tensors


def _chunk(key: str, chunk: Record, stored: dict[tuple[str, tuple[int, ...] | None], Record]) -> Chunk:
    box = Box(tuple(chunk["offsets"]), tuple(chunk["sizes"]))
    if (key, box.offset) not in stored:
        raise ValueError(f"it does not say where {key} at {box.offset} is stored")
    info = stored[key, box.offset]
    if info.state.get("transform_descriptors"):
        raise ValueError(f"{key} is stored with the transforms {info['transform_descriptors']}, which are not supported")
    offset, length = int(info["offset"]), int(info["length"])
    if offset < 0 or length < 0:
        raise ValueError(f"{key} at {box.offset} has the byte range {offset} + {length}")
    return Chunk(box, str(info["relative_path"]), offset, length)


def _dtype(properties: Record) -> str:
    dtype = properties.state[0] if isinstance(properties.state, tuple) else properties["dtype"]
    try:
        return dtype_name(dtype)
    except ValueError:
        return str(dtype)
