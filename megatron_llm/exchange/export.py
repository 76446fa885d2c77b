"""Writes a megatron-core `torch_dist` checkpoint from any source of logical tensors, one matrix in memory at a time.

The folder is what `torch_dist.py` reads: torch.distributed.checkpoint's files, all layers of a kind under one key. Megatron
loads it in any layout. `cli/export.py` calls this with a checkpoint; it needs one process and no process group.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tqdm import tqdm

from megatron_llm.config import ModelConfig
from megatron_llm.exchange.arguments import args_of, refuse_other_than_llama
from megatron_llm.exchange.names import EXTRA_STATE, LAYERS, Matrix, matrices
from megatron_llm.exchange.torch_dist import COMMON, CONFIG, METADATA, TRACKER
from megatron_llm.hf.assets import exported_files
from megatron_llm.hf.export import exported_tensors, family_of, load_tensor
from megatron_llm.hf.family import StoredTensor, whole_tensor
from megatron_llm.hf.whole import whole_folder
from megatron_llm.ops.safetensors import write_bytes
from megatron_llm.ops.storage import LocalFolder
from megatron_llm.ops.tensor_file import TensorInfo, dtype_name, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_llm.parallel.shard import TensorSource

ITERATION = "iter_0000000"
TOKENIZER = "tokenizer"
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def export_megatron(
    source: TensorSource,
    model: ModelConfig,
    assets: Mapping[str, bytes],
    output: str | Path,
    *,
    dtype: str | None = None,
    default_dtype: str = "F32",
    vocab_multiple: int = 128,
    shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    progress: bool = False,
) -> list[str]:
    """Write the folder `output` and return the names of what is in it. It appears whole or not at all.

    Args:
        source: the weights under their logical names. assets: as `collect_assets` made them.
        dtype: safetensors' name of the dtype of every tensor; None: the dtype each had in the folder it came from, in a fused
            matrix, or one of all layers, the widest of them.
        default_dtype: for models that came from no folder.
        vocab_multiple: the embedding gets rows of zeros up to a multiple of this (`--make-vocab-size-divisible-by`).
        shard_size: bytes after which a new file begins.
        overwrite: replace an older export. A folder that does not look like one is refused all the same.
        progress: show a bar.

    Raises ValueError if `output` is in the way, the source lacks a tensor, values overflow the dtype, or Megatron has no
    argument for something that the model has.
    """
    if vocab_multiple < 1:
        raise ValueError(f"the multiple of the vocabulary must be at least 1, got {vocab_multiple}")
    refuse_other_than_llama(model, "the model")
    padded = -(-model.vocab_size // vocab_multiple) * vocab_multiple
    stored = exported_tensors(family_of(assets, model), model, assets, dtype, default_dtype)
    names = {
        piece.name: (whole_tensor(piece.name, piece.shape), TensorInfo(info.dtype, piece.shape))
        for tensor, info in stored
        for piece in tensor.pieces
    }
    widths = _dtypes(model, names)
    args = args_of(model, padded, vocab_multiple, widths["embedding.word_embeddings.weight"])
    with whole_folder(output, overwrite, "export", _foreign) as folder:
        iteration = folder / ITERATION
        iteration.mkdir()
        writer = _Writer(iteration, shard_size)
        total = sum(info.nbytes for _, info in names.values())
        with tqdm(total=total, desc=f"Writing {Path(output).name}", unit="B", unit_scale=True, disable=not progress) as bar:
            for matrix in matrices(model):
                _write_matrix(writer, matrix, source, model, names, widths, padded, bar.update)
        _write_extra_states(writer, model.num_hidden_layers)
        writer.close()
        _write_common(iteration / COMMON, args)
        write_bytes(LocalFolder(iteration), CONFIG, json.dumps(_BACKENDS).encode())
        _write_tokenizer(folder / TOKENIZER, exported_files(assets))
        write_bytes(LocalFolder(folder), TRACKER, b"0")
    return sorted(path.name for path in Path(output).iterdir())


def _foreign(folder: Path) -> str | None:
    """Why a folder is no earlier export, None if it looks like one."""
    if not (folder / TRACKER).is_file():
        return f"has no {TRACKER}"
    others = sorted(path.name for path in folder.iterdir() if path.name not in (TRACKER, ITERATION, TOKENIZER))
    return f"holds {others[0]}" if others else None


def _dtypes(model: ModelConfig, names: dict[str, tuple[StoredTensor, TensorInfo]]) -> dict[str, str]:
    """safetensors' name of the dtype of every key: wide enough for all that is stored under it."""
    import torch

    found: dict[str, str] = {}
    for matrix in matrices(model):
        for piece in matrix.pieces:
            mine, others = names[piece.name][1].dtype, found.get(matrix.names[0])
            wide = torch_dtype(mine) if others is None else torch.promote_types(torch_dtype(mine), torch_dtype(others))
            found[matrix.names[0]] = dtype_name(wide)
    return found


def _write_matrix(
    writer: _Writer,
    matrix: Matrix,
    source: TensorSource,
    model: ModelConfig,
    names: dict[str, tuple[StoredTensor, TensorInfo]],
    widths: dict[str, str],
    padded: int,
    progress: Callable[[int], object],
) -> None:
    """Put the pieces of one matrix together and write it as a chunk."""
    import torch

    dtype = widths[matrix.names[0]]
    shape = (padded, *matrix.shape[1:]) if matrix.padded else matrix.shape
    values = torch.zeros(shape, dtype=torch_dtype(dtype))
    for piece in matrix.pieces:
        tensor, info = names[piece.name]
        loaded = load_tensor(source, tensor, dtype)
        for rows in piece.rows:
            values[rows.stored : rows.stored + rows.count] = loaded[rows.logical : rows.logical + rows.count]
        progress(info.nbytes)
    key, layer = next(matrix.places())
    if layer is None:
        writer.tensor(key, shape, (0,) * len(shape), values)
    else:
        writer.tensor(key, (model.num_hidden_layers, *shape), (layer, *(0,) * len(shape)), values.unsqueeze(0))


def _write_extra_states(writer: _Writer, layers: int) -> None:
    """Empty states, one a module: models with Transformer Engine look for them, and take None as nothing to restore."""
    for module in EXTRA_STATE:
        for layer in range(layers):
            writer.object(f"{LAYERS}{module}._extra_state/shard_{layer}_{layers}")
    writer.object("decoder.final_layernorm._extra_state/shard_0_1")


def _write_common(path: Path, args: Any) -> None:
    import torch

    content = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False},
    }
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _write_tokenizer(folder: Path, files: dict[str, bytes]) -> None:
    """The tokenizer's files, for `--tokenizer-model`; Megatron keeps none in a checkpoint."""
    files = {name: content for name, content in files.items() if name != "generation_config.json"}
    if not files:
        return
    folder.mkdir()
    for name, content in files.items():
        write_bytes(LocalFolder(folder), name, content)


@dataclass
class _Writer:
    """The .distcp files of a folder and, at the end, the metadata that says what is where."""

    folder: Path
    shard_size: int
    _file: BinaryIO | None = None
    _files: int = 0
    _entries: dict[str, Any] = field(default_factory=dict)
    _stored: dict[Any, Any] = field(default_factory=dict)

    def tensor(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], values: Tensor) -> None:
        """Write the chunk at `offset` of tensor `key`, which as a whole has `shape`."""
        import torch
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

        if key not in self._entries:
            self._entries[key] = TensorStorageMetadata(TensorProperties(dtype=values.dtype), torch.Size(shape), [])
        self._entries[key].chunks.append(ChunkStorageMetadata(torch.Size(offset), values.shape))
        self._save(key, offset, values)

    def object(self, key: str) -> None:
        """Write an object that holds nothing; a list, because several ranks' objects of one key are stored as one."""
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        self._entries[key] = BytesStorageMetadata()
        self._save(key, None, [None])

    def _save(self, key: str, offset: tuple[int, ...] | None, value: Any) -> None:
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import MetadataIndex

        if self._file is not None and self._file.tell() >= self.shard_size:
            self._finish()
        name = f"__0_{self._files}.distcp"
        if self._file is None:
            self._file = (self.folder / name).open("wb")
        start = self._file.tell()
        torch.save(value, self._file)
        self._stored[MetadataIndex(key, offset)] = _StorageInfo(name, start, self._file.tell() - start)

    def _finish(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._files += 1

    def close(self) -> None:
        """Finish the last file and write the metadata."""
        from torch.distributed.checkpoint.metadata import Metadata

        self._finish()
        metadata = Metadata(self._entries, storage_data=self._stored, version="1.0.0")
        write_bytes(LocalFolder(self.folder), METADATA, pickle.dumps(metadata))
