"""Native checkpoints: each rank writes the rectangles it owns, any layout reads the rectangles it needs.

A folder `step-00000100/` holds `rank-00000.safetensors` per writing rank, `assets/` and `manifest.json`. The manifest is
written last; without it there is no checkpoint. Tensors are logical ones, so nothing in a checkpoint depends on the layout.
Folders are local, or wherever fsspec reaches.
"""

from megatron_llm.checkpoint.folders import (
    checkpoint_folder,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
)
from megatron_llm.checkpoint.load import Checkpoint, CheckpointSource, open_checkpoint
from megatron_llm.checkpoint.save import Contents, SaveError, TensorToSave, save_checkpoint
from megatron_llm.checkpoint.saver import Saver

__all__ = [
    "Checkpoint",
    "CheckpointSource",
    "Contents",
    "SaveError",
    "Saver",
    "TensorToSave",
    "checkpoint_folder",
    "find_checkpoint",
    "latest_checkpoint",
    "list_checkpoints",
    "open_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
]
