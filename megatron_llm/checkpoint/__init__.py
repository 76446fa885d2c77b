"""Native checkpoints: each rank writes the rectangles it owns, any layout reads the rectangles it needs.

A folder `step-00000100/` holds `rank-00000.safetensors` per writing rank, `assets/` and `manifest.json`. The manifest is
written last; without it there is no checkpoint. Tensors are logical ones, so nothing in a checkpoint depends on the layout.
"""

from megatron_llm.checkpoint.folders import checkpoint_folder, find_checkpoint, latest_checkpoint, prune_checkpoints
from megatron_llm.checkpoint.load import Checkpoint, CheckpointSource, open_checkpoint
from megatron_llm.checkpoint.save import TensorToSave, save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointSource",
    "TensorToSave",
    "checkpoint_folder",
    "find_checkpoint",
    "latest_checkpoint",
    "open_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
]
