"""Writes a Hugging Face folder from any source of logical tensors, a small part of a tensor in memory at a time.

What came from a folder goes back as it was: same tensors, same dtypes, config.json changed only where the model was.
`cli/export.py` calls this with a checkpoint; one process writes it, or several that need no process group.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from tqdm import tqdm

from megatron_llm.config import ModelConfig
from megatron_llm.hf.assets import CONFIG, TENSOR_DTYPES, exported_files, special_token_ids
from megatron_llm.hf.families import describe
from megatron_llm.hf.family import Family, StoredTensor
from megatron_llm.hf.reader import architecture_of
from megatron_llm.hf.together import Share, write_together
from megatron_llm.ops.safetensors import Entry, write_bytes, write_safetensors
from megatron_llm.ops.storage import LocalFolder
from megatron_llm.ops.tensor_file import TORCH_NAMES, TensorInfo, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_llm.parallel.shard import Box, Part, TensorSource


_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Plan:
    """Everything an export will write: config.json's bytes, the tensors in order, the other files."""

    config: bytes
    entries: list[Entry]
    files: dict[str, bytes]


def export_hf(
    source: TensorSource,
    model: ModelConfig,
    assets: Mapping[str, bytes],
    output: str | Path,
    *,
    dtype: str | None = None,
    default_dtype: str = "F32",
    shard_size: int = 5_000_000_000,
    share: Share = Share(),
    origin: str = "",
    overwrite: bool = False,
    progress: bool = False,
) -> list[str]:
    """Write the folder `output` and return the names of its files. It appears whole or not at all.

    Several tasks may write it together, whole files each; the names are then returned by the last of them, and none by others.

    Args:
        source: the weights under their logical names.
        assets: as `collect_assets` made them; without `hf/config.json` the model was trained from scratch.
        dtype: safetensors' name of the dtype of every tensor; None: the dtype each had in the folder it came from.
        default_dtype: for models trained from scratch.
        shard_size: bytes of tensors in one file; a larger tensor has a file of its own.
        share: which task of how many this is. origin: tells the source from others with the same tensors, for tasks to agree.
        overwrite: replace an older export. A folder that does not look like one is refused all the same.
        progress: show a bar.

    Raises ValueError if `output` is in the way, the source lacks a tensor, or values overflow the dtype.
    """
    plan = _plan(source, model, assets, dtype, default_dtype)
    files = _weight_files(plan.entries, shard_size)
    mine = share.of(list(files), lambda name: _nbytes(files[name]))
    total = sum(_nbytes(files[name]) for name in mine)

    def write(folder: Path) -> None:
        with tqdm(total=total, desc=f"Writing {Path(output).name}", unit="B", unit_scale=True, disable=not progress) as bar:
            for name in mine:
                with LocalFolder(folder).create(name) as sink:
                    write_safetensors(sink, files[name], {"format": "pt"}, bar.update)

    def complete(folder: Path, _: list[Any]) -> None:
        index = {_INDEX: _index(files)} if len(files) > 1 else {}
        for name, content in {**index, "config.json": plan.config, **plan.files}.items():
            write_bytes(LocalFolder(folder), name, content)

    whole = write_together(output, overwrite, "export", _foreign, share, _job(plan, files, origin), write, complete)
    return sorted(path.name for path in Path(output).iterdir()) if whole else []


def _job(plan: _Plan, files: Mapping[str, list[Entry]], origin: str) -> dict[str, Any]:
    """What tells an export from any other."""
    tensors = {name: [(entry.key, entry.info.dtype, entry.info.shape) for entry in entries] for name, entries in files.items()}
    others = {name: xxhash.xxh3_128_hexdigest(content) for name, content in {"": plan.config, **plan.files}.items()}
    return {"origin": origin, "tensors": tensors, "others": others}


def _foreign(folder: Path) -> str | None:
    """Why a folder is no earlier export, None if it looks like one."""
    folders = [path.name for path in folder.iterdir() if path.is_dir()]
    if folders:
        return f"holds the folder {folders[0]}"
    return None if (folder / "config.json").is_file() else "has no config.json"


def family_of(assets: Mapping[str, bytes], model: ModelConfig) -> Family:
    """The family that the assets' config.json names; if the model was trained from scratch, the first that has such a model."""
    if CONFIG not in assets:
        return describe(model)[0]
    return architecture_of(json.loads(assets[CONFIG]), CONFIG)


def exported_tensors(
    family: Family, model: ModelConfig, assets: Mapping[str, bytes], dtype: str | None, default_dtype: str
) -> list[tuple[StoredTensor, TensorInfo]]:
    """(tensor of the folder, its dtype and shape) of everything to write, in the order of the forward pass."""
    dtypes: dict[str, str] = json.loads(assets.get(TENSOR_DTYPES, b"{}"))
    prefixed = not dtypes or family.is_prefixed(dtypes)
    tensors = list(family.stored_tensors(model, prefixed))
    head = family.hf_name("head.weight", prefixed)
    if model.tie_word_embeddings and head in dtypes:  # the folder it came from stores the tied matrix twice
        embedding = next(tensor for tensor in tensors if tensor.pieces[0].name == "embedding.weight")
        tensors.append(dataclasses.replace(embedding, name=head))
    return [(tensor, TensorInfo(dtype or dtypes.get(tensor.name, default_dtype), tensor.shape)) for tensor in tensors]


def _plan(source: TensorSource, model: ModelConfig, assets: Mapping[str, bytes], dtype: str | None, default_dtype: str) -> _Plan:
    """What to write; nothing is read from the source yet."""
    family = family_of(assets, model)
    entries = [
        Entry(tensor.name, info, partial(tensor_parts, source, tensor, info.dtype))
        for tensor, info in exported_tensors(family, model, assets, dtype, default_dtype)
    ]
    if CONFIG in assets:
        original: dict[str, Any] = json.loads(assets[CONFIG])
        config = family.patch(original, model)
        if dtype is not None:
            spellings = [key for key in ("dtype", "torch_dtype") if key in original] or ["torch_dtype"]
            config |= dict.fromkeys(spellings, TORCH_NAMES[dtype])
        content = assets[CONFIG] if config == original else json_bytes(config)
    else:
        described = {**family.config(model), "torch_dtype": TORCH_NAMES[dtype or default_dtype], "use_cache": True}
        content = json_bytes({**described, **special_token_ids(assets)})
    return _Plan(content, entries, exported_files(assets))


def json_bytes(value: dict[str, Any]) -> bytes:
    """A JSON file as transformers writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def load_tensor(source: TensorSource, tensor: StoredTensor, dtype: str) -> Tensor:
    """One whole tensor of the folder in the dtype of the export. Raises ValueError if a value is beyond float16's range."""
    import torch

    flat, done = torch.empty(math.prod(tensor.shape), dtype=torch_dtype(dtype)), 0
    for part in tensor_parts(source, tensor, dtype):
        flat[done : done + part.numel()] = part.reshape(-1)
        done += part.numel()
    return flat.view(tensor.shape)


def tensor_parts(source: TensorSource, tensor: StoredTensor, dtype: str) -> Iterator[Tensor]:
    """The same in small parts, whose elements follow each other as the folder has them."""
    import torch

    from megatron_llm.parallel.shard import Box, Part, slabs

    checked, to = _Checked(source, tensor.name, dtype), torch_dtype(dtype)
    runs = sorted(((rows, piece) for piece in tensor.pieces for rows in piece.rows), key=lambda run: run[0].stored)
    boxes = [
        (Part(piece.name, piece.shape, ()), Box((rows.logical, *(0 for _ in piece.shape[1:])), (rows.count, *piece.shape[1:])))
        for rows, piece in runs
    ]
    if not tensor.transposed:
        for part, box in boxes:
            for slab in slabs(box):
                yield checked.read(part, slab).to(to)
        return
    for slab in slabs(Box.full(tensor.shape)):  # some inputs of all outputs
        columns = [Box((box.offset[0], slab.offset[0]), (box.shape[0], slab.shape[0])) for _, box in boxes]
        yield torch.cat([checked.read(part, box).to(to) for (part, _), box in zip(boxes, columns, strict=True)]).t()


@dataclass(frozen=True)
class _Checked:
    """A source whose values fit into the dtype of the export."""

    source: TensorSource
    name: str
    dtype: str

    def read(self, part: Part, box: Box) -> Tensor:
        import torch

        values = self.source.read(part, box)
        if self.dtype == "F16" and values.dtype != torch.float16:
            converted = values.to(torch.float16)
            if bool((converted.isinf() & ~values.isinf()).any()):
                largest = values[~values.isinf()].abs().max().item()
                raise ValueError(
                    f"{self.name} has values up to {largest:g}, beyond float16's 65504; export with --dtype bf16 or fp32"
                )
        return values


def _nbytes(entries: Sequence[Entry]) -> int:
    return sum(entry.info.nbytes for entry in entries)


def _weight_files(entries: list[Entry], shard_size: int) -> dict[str, list[Entry]]:
    """model.safetensors, or numbered files if the tensors have more than `shard_size` bytes."""
    shards: list[list[Entry]] = [[]]
    room = shard_size
    for entry in entries:
        if entry.info.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_size
        shards[-1].append(entry)
        room -= entry.info.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)}


def _index(files: Mapping[str, list[Entry]]) -> bytes:
    """Which file has which tensor."""
    weight_map = {entry.key: name for name, entries in files.items() for entry in entries}
    total = sum(_nbytes(entries) for entries in files.values())
    return json_bytes({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
