"""Saving a run and continuing it: from which checkpoint, whether it fits, what is loaded.

Called by `training/loop.py` and `training/rollback.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llm.checkpoint.folders import checkpoint_folder, list_checkpoints, prune_checkpoints
from megatron_llm.checkpoint.load import Checkpoint
from megatron_llm.checkpoint.save import Contents, TensorToSave
from megatron_llm.checkpoint.saver import Saver
from megatron_llm.config import Config, ConfigError, parse_config
from megatron_llm.data.stream import describe_data
from megatron_llm.ops.storage import Folder, open_folder
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part
from megatron_llm.training.agreement import AgreedError, all_gather_objects
from megatron_llm.training.build import Engine
from megatron_llm.training.changes import Changes, find_changes
from megatron_llm.training.distributed import launched_rank
from megatron_llm.training.step import RunState

logger = logging.getLogger("megatron_llm")


def checkpoints_folder(config: Config) -> Folder:
    """Where the checkpoints of a run lie. Raises ValueError for a URL that cannot be used."""
    return open_folder(config.checkpoint.path or Path(config.logging.run_dir) / "checkpoints")


def find_resume(config: Config, allow_change: bool = False) -> Checkpoint | None:
    """The checkpoint to continue from, if the config says so and there is one; its content has not been read yet.

    Raises ConfigError if all that were saved are damaged, or with `resume: strict` the newest; if the checkpoint belongs to
    another model, or to rows of another length, by which data order is counted; or if a changed setting would make it another
    run, unless that is allowed.
    """
    if config.checkpoint.resume == "never":
        return None
    checkpoint = newest_checkpoint(config, {})
    if checkpoint is not None:
        refuse_changes(changes_since(checkpoint, config), checkpoint, allow_change)
    return checkpoint


def newest_checkpoint(config: Config, damaged: Mapping[str, str]) -> Checkpoint | None:
    """The newest whole checkpoint of a run but those in `damaged` (folder -> what is wrong). Says which are passed over.

    Raises ConfigError if there are only damaged ones, or the newest is and must not be passed over.
    """
    place = checkpoints_folder(config)
    problems: list[str] = []
    for found in list_checkpoints(place):
        if isinstance(found, Checkpoint) and str(found.folder) not in damaged:
            for problem in problems if launched_rank() == 0 else []:
                logger.warning("%s; going on from %s, which was saved before", problem, found.folder)
            return found
        problems.append(str(found) if isinstance(found, ValueError) else damaged[str(found.folder)])
        if config.checkpoint.resume == "strict":
            raise ConfigError(
                [
                    f"checkpoint.resume: strict, and the newest checkpoint is damaged: {problems[0]}. Restore it, delete its "
                    "folder, or take the one before with checkpoint.resume=auto"
                ]
            )
    if problems:
        raise ConfigError(
            [f"{problem}" for problem in problems]
            + [f"no checkpoint in {place} is whole: restore one, or start anew with checkpoint.resume=never"]
        )
    return None


def changes_since(checkpoint: Checkpoint, config: Config) -> Changes:
    """What a run that goes on from a checkpoint changes."""
    saved = parse_config(checkpoint.config)  # with the defaults of settings that are younger
    return find_changes(saved, checkpoint.data, config, describe_data(config))


def refuse_changes(changes: Changes, checkpoint: Checkpoint, allow_change: bool) -> None:
    """Raise ConfigError if changes make another run of it and are not meant. Before the first step there is none."""
    problems = [
        f"{checkpoint.folder} belongs to another run ({change}); choose another logging.run_dir, or start anew with "
        "checkpoint.resume=never"
        for change in changes.of_another_run
    ]
    if not allow_change and checkpoint.step:
        problems += [
            f"changed since {checkpoint.folder} was saved: {change}. The run would go on as another one: undo the change, or "
            "allow it with --allow-change"
            for change in changes.decides_numbers
        ]
    if problems:
        raise ConfigError(problems)


def verified(
    checkpoint: Checkpoint | None, config: Config, world: Axis, progress: Callable[[float], object]
) -> Checkpoint | None:
    """The checkpoint to continue from, on which all ranks agree and whose every byte is what was written. Collective.

    A damaged one is passed over, or ends the run (see `newest_checkpoint`); then AgreedError is raised on all ranks.
    progress: told which part of the reading is done, which ranks share.
    """
    damaged: dict[str, str] = {}
    while checkpoint_damage := _agreed_damage(checkpoint, config, world, progress):
        assert checkpoint is not None
        damaged[str(checkpoint.folder)] = checkpoint_damage
        try:
            checkpoint = newest_checkpoint(config, damaged)
        except ConfigError as error:
            raise AgreedError(str(error)) from error
    return checkpoint


def check_source(source: Checkpoint, config: Config, world: Axis, progress: Callable[[float], object]) -> None:
    """Raise AgreedError on all ranks unless all are about to start from the same, undamaged checkpoint. Collective."""
    if damage := _agreed_damage(source, config, world, progress):
        raise AgreedError(f"model.checkpoint: {damage}. Restore it, or start from another")


def _agreed_damage(checkpoint: Checkpoint | None, config: Config, world: Axis, progress: Callable[[float], object]) -> str:
    """What is wrong with the content of a checkpoint that all ranks have found; "" if nothing is, or nobody wants to know."""
    check_agreement(checkpoint, world)
    if checkpoint is None or not config.checkpoint.verify:
        return ""
    done, total = 0, max(1, checkpoint.nbytes // world.size)

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(min(1.0, done / total))

    mine = checkpoint.damaged(world.rank, world.size, count)
    return "; ".join(problem for of_rank in all_gather_objects(mine, world) for problem in of_rank)


def check_agreement(checkpoint: Checkpoint | None, world: Axis) -> None:
    """Raise AgreedError on all ranks unless all are about to continue from the same step. Collective.

    Each rank has looked for itself. Without a shared folder, or with one whose listing is stale on some node, the weights
    of different steps would train on together and nothing would say so.
    """
    steps: list[int | None] = all_gather_objects(checkpoint.step if checkpoint else None, world)
    if len(set(steps)) > 1:
        found = (f"rank {steps.index(step)} {'none' if step is None else f'step {step}'}" for step in dict.fromkeys(steps))
        raise AgreedError(
            f"ranks see different checkpoints to continue from: {', '.join(found)}; they must be in a folder that all "
            "nodes share (logging.run_dir, or checkpoint.path). If it is one, its listing was stale on some node: start again"
        )


def load_run(engine: Engine, checkpoint: Checkpoint, progress: Callable[[float], object] = lambda _: None) -> RunState:
    """Fill all state but the weights from a checkpoint of any layout, and return where the run stood. Collective.

    The engine has the checkpoint's weights already. Moments that the checkpoint lacks, or that mean something else because
    another optimizer made them, start at zero; an average of the weights that it lacks starts from the weights.
    """
    optimizer, name = engine.optimizer, engine.config.optimizer.name
    saved_by = checkpoint.config["optimizer"].get("name", "adamw")
    lost = [kind for kind in checkpoint.kinds if kind not in optimizer.state_kinds]
    if lost and engine.grid.world.first:
        logger.warning("%s has %s, for which this run has no use", checkpoint.folder, " and ".join(lost))
    for kind in optimizer.state_kinds:
        if kind == "weights":
            continue
        average = kind == "ema"
        if kind in checkpoint.kinds and (average or saved_by == name):
            optimizer.load(kind, checkpoint.source(kind) if average else _Moments(checkpoint, kind), progress)
            continue
        optimizer.load(kind, checkpoint.source("weights") if average else _Zeros(), progress)
        if engine.grid.world.first:
            reason = f"are of {saved_by}" if kind in checkpoint.kinds else "are not there"
            start = "from the weights" if average else "at zero"
            logger.warning("%r in %s %s: those of %s start %s", kind, checkpoint.folder, reason, name, start)
    return RunState(**checkpoint.run_state)


class _Zeros:
    """A `TensorSource` of zeros."""

    def read(self, part: Part, box: Box) -> Tensor:
        return torch.zeros(box.shape)


class _Moments:
    """The moments of a checkpoint, and zeros for weights that were frozen when it was saved."""

    def __init__(self, checkpoint: Checkpoint, kind: str):
        self._source, self._saved, self._frozen = checkpoint.source(kind), checkpoint.tensors(kind), checkpoint.source("weights")

    def read(self, part: Part, box: Box) -> Tensor:
        if part.name in self._saved:
            return self._source.read(part, box)
        return torch.zeros_like(self._frozen.read(part, box))  # a name that is nowhere is an error


def make_saver(config: Config, world: Axis, alive: Callable[[], None] = lambda: None) -> Saver:
    """What saves the run of a config. alive: called while training waits for a save that makes headway."""
    settings = config.checkpoint

    def prune(checkpoints: Folder) -> None:
        try:
            prune_checkpoints(checkpoints, settings.keep_last, settings.keep_every)
        except OSError as error:  # the new checkpoint is whole; that an old one stays is no reason to end the run
            logger.warning("could not delete old checkpoints in %s: %s", checkpoints, error)

    return Saver(world, settings.asynchronous, prune, alive)


def start_save(
    saver: Saver, engine: Engine, state: RunState, assets: dict[str, bytes], data: dict[str, Any], wait: bool = False
) -> None:
    """Begin to write a checkpoint, when the one before is committed. Collective; raises SaveError if either fails.

    data: as `describe_data` gives them. wait: return when it is committed.
    """
    config = engine.config
    folder = checkpoint_folder(checkpoints_folder(config), state.step)
    tensors = (
        TensorToSave(kind, piece.part.name, piece.part.shape, piece.box, values)
        for kind in engine.optimizer.state_kinds
        for piece, values in engine.optimizer.state_pieces(kind)
        if piece.part.replica_rank == 0
    )
    saver.start(folder, tensors, Contents(asdict(state), config.model_dump(mode="json"), assets, data), wait)
