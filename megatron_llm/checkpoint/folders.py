"""Which checkpoints a run has: the newest whole one, the old ones to delete, and what a path on the command line means.

`training/recovery.py` calls `latest_checkpoint` on every rank when a run starts, before anything is written, and
`prune_checkpoints` on rank 0 after each save.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from megatron_llm.checkpoint.load import open_checkpoint
from megatron_llm.checkpoint.manifest import MANIFEST
from megatron_llm.checkpoint.save import delete_checkpoint

logger = logging.getLogger(__name__)


def checkpoint_folder(checkpoints: str | Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return Path(checkpoints) / f"step-{step:08d}"


def _by_step(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that looks like a checkpoint, newest first."""
    if not checkpoints.is_dir():
        return []
    matches = ((re.fullmatch(r"step-(\d{8,})", path.name), path) for path in checkpoints.iterdir() if path.is_dir())
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _is_whole(folder: Path) -> bool:
    """Whether a folder is a checkpoint. One that should be, but is damaged, is named in a warning."""
    if not (folder / MANIFEST).exists():
        return False  # a save that was interrupted
    try:
        open_checkpoint(folder)
    except ValueError as error:
        logger.warning("ignoring a damaged checkpoint: %s", error)
        return False
    return True


def latest_checkpoint(checkpoints: str | Path) -> Path | None:
    """The newest whole checkpoint in a `checkpoints` folder, None if there is none."""
    return next((folder for _, folder in _by_step(Path(checkpoints)) if _is_whole(folder)), None)


def prune_checkpoints(checkpoints: str | Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` whole checkpoints, and what interrupted saves before the newest one left.

    Damaged ones are neither counted nor deleted: somebody may want to look at them.
    """
    assert keep_last > 0
    folders = [folder for _, folder in _by_step(Path(checkpoints))]
    whole = [folder for folder in folders if _is_whole(folder)]
    if not whole:
        return
    older = folders[folders.index(whole[0]) + 1 :]
    for folder in whole[keep_last:] + [folder for folder in older if not (folder / MANIFEST).exists()]:
        delete_checkpoint(folder)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a user means: a step folder itself, or the newest whole one of a `checkpoints` or run folder.

    Raises ValueError saying where it looked.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; expected a checkpoint, a folder of checkpoints or a run folder")
    if (path / MANIFEST).exists() or re.fullmatch(r"step-\d{8,}", path.name):
        open_checkpoint(path)
        return path
    for folder in (path / "checkpoints", path):
        found = latest_checkpoint(folder)
        if found is not None:
            return found
    raise ValueError(
        f"no whole checkpoint in {path} (looked for {MANIFEST} in it and in its step-* and checkpoints/step-* folders)"
    )
