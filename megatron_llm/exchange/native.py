"""Native checkpoints that no run has written: weights only, at step 0. Called by `imports.py`.

An imported checkpoint's config is `{"model": ...}` alone: there is no run to describe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_llm.checkpoint import Contents, SaveError, TensorToSave, open_checkpoint, save_checkpoint
from megatron_llm.config import ModelConfig
from megatron_llm.hf.whole import whole_folder
from megatron_llm.models.names import logical_tensors
from megatron_llm.ops.tensor_file import TensorInfo, torch_dtype
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part, TypedSource, fill

_MANIFEST = "manifest.json"


def write_checkpoint(
    source: TypedSource,
    model: ModelConfig,
    assets: Mapping[str, bytes],
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write the folder `output` as a native checkpoint of `source`'s weights, in their dtypes. It appears whole or not at all.

    Args:
        assets: as `collect_assets` made them.
        overwrite: replace a checkpoint that is there. Anything else in the way is refused all the same.
        progress: show a bar.

    Raises ValueError if `output` is in the way, the source lacks a tensor, or the checkpoint could not be written.
    """
    names = list(logical_tensors(model))
    total = sum(TensorInfo(source.dtype(name), shape).nbytes for name, shape in names)
    config = {"model": model.model_copy(update={"hf": None, "resize_vocab": 0}).model_dump(mode="json")}
    state = {"step": 0, "updates": 0, "rows": 0, "tokens": 0}
    with (
        whole_folder(output, overwrite, "checkpoint", _foreign) as folder,
        tqdm(total=total, desc=f"Writing {Path(output).name}", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        tensors = [_tensor(source, name, shape, bar.update) for name, shape in names]
        try:
            save_checkpoint(folder, tensors, Contents(state, config, dict(assets)), Axis("world"))
        except SaveError as error:
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None  # of the source: what was to be written has nothing to do with it
            raise


def _foreign(folder: Path) -> str | None:
    if not (folder / _MANIFEST).is_file():
        return f"has no {_MANIFEST}"
    return "is the checkpoint of a run" if "training" in open_checkpoint(folder).config else None


def _tensor(source: TypedSource, name: str, shape: tuple[int, ...], done: Callable[[int], object]) -> TensorToSave:
    """A tensor of the model, which is read when its turn comes, a slab at a time: pieces of it need no memory beside it."""
    part, box, dtype = Part(name, shape, ()), Box.full(shape), torch_dtype(source.dtype(name))

    def load() -> Tensor:
        values = torch.empty(shape, dtype=dtype)
        for count in fill(values, part, box, source):
            done(count * dtype.itemsize)
        return values

    return TensorToSave("weights", name, shape, box, torch.empty(shape, dtype=dtype, device="meta"), load)
