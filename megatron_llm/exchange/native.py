"""Native checkpoints that no run has written: weights only, at step 0. Called by `imports.py`.

An imported checkpoint's config is `{"model": ...}` alone: there is no run to describe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from megatron_llm.checkpoint import Contents, TensorToSave, open_checkpoint
from megatron_llm.checkpoint.save import RankFile, commit, rank_file, write_rank_file
from megatron_llm.config import ModelConfig
from megatron_llm.hf.together import Share, write_together
from megatron_llm.models.names import logical_tensors
from megatron_llm.ops.safetensors import WrittenFile
from megatron_llm.ops.storage import LocalFolder
from megatron_llm.ops.tensor_file import TensorInfo, torch_dtype
from megatron_llm.parallel.shard import Box, Part, TypedSource, slabs

_MANIFEST = "manifest.json"


def write_checkpoint(
    source: TypedSource,
    model: ModelConfig,
    assets: Mapping[str, bytes],
    output: str | Path,
    *,
    share: Share = Share(),
    origin: str = "",
    overwrite: bool = False,
    progress: bool = False,
) -> bool:
    """Write the folder `output` as a native checkpoint of `source`'s weights, in their dtypes. It appears whole or not at all.

    Args:
        assets: as `collect_assets` made them.
        share: which task of how many this is, if several write it together. origin: tells the source from others with the same
            tensors, for tasks to agree.
        overwrite: replace a checkpoint that is there. Anything else in the way is refused all the same.
        progress: show a bar.

    Returns whether it is there: other tasks may not have ended. Raises ValueError if `output` is in the way, or the source
    lacks a tensor.
    """
    infos = {name: TensorInfo(source.dtype(name), shape) for name, shape in logical_tensors(model)}
    config = {"model": model.model_copy(update={"hf": None, "resize_vocab": 0}).model_dump(mode="json")}
    contents = Contents({"step": 0, "updates": 0, "rows": 0, "tokens": 0}, config, dict(assets))
    job = {
        "origin": origin,
        "tensors": {name: (info.dtype, info.shape) for name, info in infos.items()},
        "others": [config, {name: xxhash.xxh3_128_hexdigest(content) for name, content in assets.items()}],
    }

    def tensors(of: Share, done: Callable[[int], object] = lambda _: None) -> list[TensorToSave]:
        return [_tensor(source, name, infos[name], done) for name in of.of(list(infos), lambda name: infos[name].nbytes)]

    def write(folder: Path) -> dict[str, Any] | None:
        total = sum(infos[item.name].nbytes for item in tensors(share))
        with tqdm(total=total, desc=f"Writing {Path(output).name}", unit="B", unit_scale=True, disable=not progress) as bar:
            file = write_rank_file(LocalFolder(folder), share.index, tensors(share, bar.update))
        return None if file is None else asdict(file.written)

    def complete(folder: Path, written: list[dict[str, Any] | None]) -> None:
        files: list[RankFile | None] = []
        for index, proof in enumerate(written):
            if proof is not None:
                name, _, stored = rank_file(index, tensors(Share(index, share.count)))
                files.append(RankFile(name, WrittenFile(**proof), stored))
        commit(LocalFolder(folder), files, contents)

    return write_together(output, overwrite, "checkpoint", _foreign, share, job, write, complete)


def _foreign(folder: Path) -> str | None:
    if not (folder / _MANIFEST).is_file():
        return f"has no {_MANIFEST}"
    return "is the checkpoint of a run" if "training" in open_checkpoint(folder).config else None


def _tensor(source: TypedSource, name: str, info: TensorInfo, done: Callable[[int], object]) -> TensorToSave:
    """A tensor of the model, which is read when its turn comes, a slab at a time."""
    part, box = Part(name, info.shape, ()), Box.full(info.shape)

    def load() -> Iterator[Tensor]:
        for slab in slabs(box):
            values = source.read(part, slab)
            done(values.nbytes)
            yield values

    like = torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")
    return TensorToSave("weights", name, info.shape, box, like, load)
