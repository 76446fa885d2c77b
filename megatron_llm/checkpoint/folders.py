"""Which checkpoints a run has: the newest whole one, the old ones to delete, and what a path on the command line means.

`training/recovery.py` calls `list_checkpoints` on every rank when a run starts, before anything is written, and
`prune_checkpoints` on rank 0 after each save. There is no file that names the newest one: what is there says it, and cannot lie.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from megatron_llm.checkpoint.load import Checkpoint, open_checkpoint
from megatron_llm.checkpoint.manifest import MANIFEST
from megatron_llm.checkpoint.save import delete_checkpoint
from megatron_llm.ops.storage import Folder, LocalFolder, open_folder

logger = logging.getLogger(__name__)


def checkpoint_folder(checkpoints: str | Path | Folder, step: int) -> Folder:
    """The folder of the checkpoint after `step` optimizer steps."""
    return open_folder(checkpoints).child(f"step-{step:08d}")


def _by_step(checkpoints: Folder) -> list[tuple[int, Folder]]:
    """(step, folder) of everything that looks like a checkpoint, newest first."""
    matches = (re.fullmatch(r"step-(\d{8,})", name) for name in checkpoints.names())
    steps = sorted(((int(match[1]), match[0]) for match in matches if match), reverse=True)
    return [(step, checkpoints.child(name)) for step, name in steps]


def list_checkpoints(checkpoints: str | Path | Folder) -> Iterator[Checkpoint | ValueError]:
    """What was saved to the end, newest first: each a checkpoint, or what is wrong with it. Opened as they are asked for.

    Saves that were interrupted are left out: nothing is wrong with them.
    """
    for step, folder in _by_step(open_folder(checkpoints)):
        if MANIFEST in folder.names():
            try:
                yield _open(folder, step)
            except ValueError as error:
                yield error


def _open(folder: Folder, step: int) -> Checkpoint:
    """A checkpoint that is what its name says. Raises ValueError."""
    checkpoint = open_checkpoint(folder)
    if checkpoint.step != step:
        raise ValueError(f"{folder} holds step {checkpoint.step}: it was renamed or copied; give it the name of its step")
    return checkpoint


def latest_checkpoint(checkpoints: str | Path | Folder) -> Checkpoint | None:
    """The newest whole checkpoint in a `checkpoints` folder, None if there is none. Damaged ones are named in a warning."""
    for found in list_checkpoints(checkpoints):
        if isinstance(found, Checkpoint):
            return found
        logger.warning("ignoring a damaged checkpoint: %s", found)
    return None


def prune_checkpoints(newest: Folder, keep_last: int, keep_every: int = 0, known: set[str] | None = None) -> None:
    """Of the checkpoints up to `newest`, which is whole, delete all but the last `keep_last`, and what interrupted saves left.

    Those of every `keep_every`-th step stay for good (0: none). Damaged ones are neither counted nor deleted, because somebody
    may want to look at them, nor are those of later steps: the run did not go on from them, and will write them anew.

    known: names that were found whole before, so that nothing is opened twice; more are added.
    """
    assert keep_last > 0
    known = set() if known is None else known
    last = int(newest.name.removeprefix("step-"))
    whole = 1
    for step, folder in _by_step(newest.parent()):
        if step >= last:
            continue
        if MANIFEST in folder.names():
            if keep_every and step % keep_every == 0 and whole >= keep_last:
                continue
            if folder.name not in known:
                try:
                    _open(folder, step)
                except ValueError:
                    continue
                known.add(folder.name)
            whole += 1
            if whole <= keep_last:
                continue
        try:
            delete_checkpoint(folder)
        except Exception as error:  # file systems have errors of their own; what can be deleted is
            logger.warning("could not delete %s: %s: %s", folder, type(error).__name__, error)


def find_checkpoint(path: str | Path | Folder) -> Checkpoint:
    """The checkpoint that a user means: a step folder itself, or the newest whole one of a `checkpoints` or run folder.

    Raises ValueError saying where it looked.
    """
    folder = open_folder(path)
    files = folder.names()
    if MANIFEST in files or re.fullmatch(r"step-\d{8,}", folder.name):
        return open_checkpoint(folder)
    if not files and not (isinstance(folder, LocalFolder) and folder.path.is_dir()):
        raise ValueError(f"{path} is not a folder; expected a checkpoint, a folder of checkpoints or a run folder")
    places = [folder.child("checkpoints"), folder]
    if "config.yaml" in files and (elsewhere := _checkpoint_path(folder)):
        places = [open_folder(elsewhere)]
    for place in places:
        found = latest_checkpoint(place)
        if found is not None:
            return found
    raise ValueError(f"no whole checkpoint in {path} (looked for step-*/{MANIFEST} in {' and '.join(map(str, places))})")


def _checkpoint_path(run: Folder) -> str | None:
    """Where the settings in a run folder say that its checkpoints are, if not in it."""
    try:
        return str(yaml.safe_load(run.read_bytes("config.yaml"))["checkpoint"]["path"] or "") or None
    except (yaml.YAMLError, KeyError, TypeError):
        return None
