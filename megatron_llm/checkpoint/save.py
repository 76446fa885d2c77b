"""Saving: every rank writes its own file, rank 0 checks that the whole model is there and commits with the manifest.

    prepare   rank 0 makes an empty folder                                     -> all ranks know whether that worked
    write     every rank writes what it owns                                   -> all ranks know whether that worked
    commit    rank 0 looks whether the files make whole tensors, writes the manifest

Each stage fails on all ranks or on none, so that a full disk on one node neither hangs the others nor leaves half a
checkpoint that looks whole. `save_checkpoint` does one after the other; `saver.py` does the same behind the training steps.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from megatron_llm import __version__
from megatron_llm.checkpoint.manifest import MANIFEST, Manifest, StoredBox, StoredTensor, Tensors, untiled, write_manifest
from megatron_llm.ops.safetensors import Entry, WrittenFile, write_bytes, write_safetensors
from megatron_llm.ops.storage import Folder, open_folder
from megatron_llm.ops.tensor_file import TensorInfo, dtype_name
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.objects import all_gather_objects, gather_objects_to_first
from megatron_llm.parallel.shard import Box

logger = logging.getLogger(__name__)
T = TypeVar("T")
_SEEN_SECONDS = 90.0  # NFS clients believe in what they know of a folder for up to 60 s


class SaveError(ValueError):
    """A checkpoint could not be written. Raised on every rank, naming the ranks and what happened to them."""


@dataclass(frozen=True)
class TensorToSave:
    """A rectangle of a logical tensor that this rank writes.

    Attributes:
        kind: "weights", "m", "v" or "ema".
        name, shape: logical name, and shape of the whole logical tensor.
        box: which rectangle of it.
        tensor: the values, of `box.shape`, on any device; a view will do. On the meta device if `load` makes them.
        load: called when their turn comes, so that they need not all be in memory; as of `Entry`.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    load: Callable[[], Tensor | Iterable[Tensor]] | None = None


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds besides tensors; the same on all ranks.

    Attributes:
        run_state, config, facts: stored as JSON; see `Manifest`.
        assets: files that travel along, name -> content, stored under `assets/`.
    """

    run_state: dict[str, Any]
    config: dict[str, Any]
    assets: dict[str, bytes] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


StoredAs = tuple[str, str, tuple[int, ...], str, StoredBox]
"""(kind, name, shape, dtype, where) of a rectangle in a file."""


@dataclass(frozen=True)
class RankFile:
    """What one rank wrote: the file's name and proof, and what it holds."""

    name: str
    written: WrittenFile
    tensors: list[StoredAs]


def save_checkpoint(folder: str | Path | Folder, tensors: Iterable[TensorToSave], contents: Contents, world: Axis) -> None:
    """Write a checkpoint. Collective over `world`; every rank passes its own `tensors` and the same of everything else.

    Together the ranks' boxes must cover every logical tensor exactly once: of replicas, one rank passes its copy. What is
    in `folder` already, whole or left by an interrupted save, is replaced. One tensor at a time is copied to the host.

    Args:
        folder: `RUN/checkpoints/step-XXXXXXXX`, which all ranks must see.

    Raises SaveError on every rank if the checkpoint could not be written.
    """
    folder = open_folder(folder)
    on_all(world, folder, lambda: prepare(folder, contents) if world.first else None)
    mine = on_all(world, folder, lambda: write_rank_file(folder, world.rank, tensors))
    files = gather_objects_to_first(mine, world)
    on_all(world, folder, lambda: commit(folder, files, contents) if world.first else None)


def on_all(world: Axis, folder: Folder, work: Callable[[], T]) -> T:
    """This rank's result of `work`; if it raises anywhere, all ranks raise SaveError. Collective."""
    result: T | None = None
    error: str | None = None
    cause: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # whatever it is, the other ranks wait for this one's answer
        error, cause = f"{type(caught).__name__}: {caught}", caught
    problems = [f"rank {rank}: {error}" for rank, error in enumerate(all_gather_objects(error, world)) if error is not None]
    if problems:
        raise SaveError(f"checkpoint {folder} was not written: " + "; ".join(problems)) from cause
    return cast(T, result)


def prepare(folder: Folder, contents: Contents) -> None:
    """Rank 0, before anything large is written: find out what cannot work, make an empty folder."""
    json.dumps([contents.run_state, contents.config, contents.facts])
    for name in contents.assets:
        if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).name:
            raise ValueError(f"asset name {name!r} leads out of the checkpoint")
    if present := folder.names():
        if MANIFEST in present:
            logger.warning("replacing checkpoint %s", folder)
        delete_checkpoint(folder)
    folder.make()


def delete_checkpoint(folder: Folder) -> None:
    """Remove a checkpoint folder; from the first moment on it is no checkpoint, even if the rest is interrupted."""
    folder.remove(MANIFEST)
    folder.delete()


def write_rank_file(
    folder: Folder, rank: int, tensors: Iterable[TensorToSave], progress: Callable[[int], object] | None = None
) -> RankFile | None:
    """Write one rank's tensors, return what the manifest needs to know; None, and no file, if there are none."""
    name, entries, stored = rank_file(rank, tensors)
    if not entries:
        return None
    with folder.create(name) as sink:
        written = write_safetensors(sink, entries, {"format": "pt"}, progress)
    return RankFile(name, written, stored)


def rank_file(rank: int, tensors: Iterable[TensorToSave]) -> tuple[str, list[Entry], list[StoredAs]]:
    """The name of one rank's file, the tensors in it, and what they are in the whole model."""
    name = f"rank-{rank:05d}.safetensors"
    entries: list[Entry] = []
    stored: list[StoredAs] = []
    for item in tensors:
        if tuple(item.tensor.shape) != item.box.shape:
            raise ValueError(f"{item.kind} of {item.name}: a tensor of shape {tuple(item.tensor.shape)} for the box {item.box}")
        if not item.box.numel:
            continue
        key = f"{item.kind}/{item.name}@{','.join(map(str, item.box.offset))}"
        info = TensorInfo(dtype_name(item.tensor.dtype), item.box.shape)
        entries.append(Entry(key, info, item.load or item.tensor.detach))
        stored.append((item.kind, item.name, tuple(item.shape), info.dtype, StoredBox(item.box, name, key)))
    return name, entries, stored


def commit(folder: Folder, rank_files: list[RankFile | None], contents: Contents) -> None:
    """Rank 0, when all files are on disk: check that they make whole tensors, write the assets, then the manifest.

    Raises ValueError naming a tensor whose boxes overlap, leave gaps, or disagree about its shape or dtype.
    """
    written = [file for file in rank_files if file is not None]
    tensors = _joined(written)
    _wait_until_seen(folder, written)
    files = {file.name: file.written for file in written}
    for name, content in contents.assets.items():
        files[f"assets/{name}"] = write_bytes(folder, f"assets/{name}", content)
    versions = {"megatron_llm": __version__, "torch": str(torch.__version__)}
    write_manifest(folder, Manifest(contents.run_state, contents.config, tensors, files, versions, contents.facts))


def _wait_until_seen(folder: Folder, written: list[RankFile]) -> None:
    """Network file systems show what other nodes have written some time later. Raises ValueError naming what does not appear."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while True:
        present = folder.files()
        unseen = [file.name for file in written if present.get(file.name) != file.written.bytes]
        if not unseen:
            return
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder}/{unseen[0]} was written, but rank 0 does not see it after {_SEEN_SECONDS:g} s; checkpoints need a "
                "folder that all nodes share"
            )
        time.sleep(1.0)


def _joined(files: list[RankFile]) -> Tensors:
    """The logical tensors that the ranks' boxes make up, each checked to be covered exactly once."""
    boxes: dict[tuple[str, str], list[StoredBox]] = {}
    looks: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    for file in files:
        for kind, name, shape, dtype, stored in file.tensors:
            boxes.setdefault((kind, name), []).append(stored)
            look = looks.setdefault((kind, name), (shape, dtype))
            if look != (shape, dtype):
                raise ValueError(f"{kind} of {name} is {look[1]} {look[0]} on one rank, {dtype} {shape} in {file.name}")
    tensors: Tensors = {}
    for (kind, name), stored_boxes in boxes.items():
        shape, dtype = looks[kind, name]
        problem = untiled(shape, [stored.box for stored in stored_boxes])
        if problem:
            raise ValueError(f"{kind} of {name}: {problem}")
        tensors.setdefault(kind, {})[name] = StoredTensor(shape, dtype, tuple(stored_boxes))
    return tensors
