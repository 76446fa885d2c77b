"""Saving a run and continuing it. Called by `training/loop.py`."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llm.checkpoint.folders import checkpoint_folder, latest_checkpoint, prune_checkpoints
from megatron_llm.checkpoint.load import Checkpoint, open_checkpoint
from megatron_llm.checkpoint.save import TensorToSave, save_checkpoint
from megatron_llm.config import Config, ConfigError, parse_config
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part
from megatron_llm.training.agreement import AgreedError, all_gather_objects
from megatron_llm.training.build import Engine
from megatron_llm.training.step import RunState

logger = logging.getLogger("megatron_llm")


def checkpoints_folder(config: Config) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(config.logging.run_dir) / "checkpoints"


def find_resume(config: Config) -> Checkpoint | None:
    """The checkpoint to continue from, if the config says so and there is one.

    Raises ConfigError if it belongs to another model, or to rows of another length, by which data order is counted;
    other changed settings are logged.
    """
    if config.checkpoint.resume == "never":
        return None
    folder = latest_checkpoint(checkpoints_folder(config))
    if folder is None:
        return None
    checkpoint = open_checkpoint(folder)
    saved = parse_config(checkpoint.config).model_dump(mode="json")  # with the defaults of settings that are younger
    changes = _differences(saved, config.model_dump(mode="json"))
    foreign = [change for change in changes if _is_another_run(change)]
    if foreign:
        way_out = "choose another logging.run_dir, or start anew with checkpoint.resume=never"
        raise ConfigError([f"{folder} belongs to another run ({change}); {way_out}" for change in foreign])
    for change in changes:
        logger.warning("changed since %s was saved: %s", folder, change)
    return checkpoint


def _is_another_run(change: str) -> bool:
    """Whether a changed setting makes a checkpoint useless: a model of another shape, or rows that mean something else."""
    harmless = ("model.hf:", "model.max_position_embeddings:", "model.initializer_range:")
    return change.startswith(("model.", "training.sequence_length:")) and not change.startswith(harmless)


def check_agreement(checkpoint: Checkpoint | None, world: Axis) -> None:
    """Raise AgreedError on all ranks unless all are about to continue from the same step. Collective.

    Each rank has looked for itself. Without a shared folder, or with one whose listing is stale on some node, the weights
    of different steps would train on together and nothing would say so.
    """
    steps: list[int | None] = all_gather_objects(checkpoint.run_state["step"] if checkpoint else None, world)
    if len(set(steps)) > 1:
        found = (f"rank {steps.index(step)} {'none' if step is None else f'step {step}'}" for step in dict.fromkeys(steps))
        raise AgreedError(
            f"ranks see different checkpoints to continue from: {', '.join(found)}; logging.run_dir must be a folder that all "
            "nodes share. If it is one, its listing was stale on some node: start again"
        )


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings whose values differ, as `section.key: old -> new`."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found


def schedule_changes(before: dict[str, Any], config: Config) -> list[str]:
    """Settings of learning rate and batch size that are not those of the saved config `before`, as `section.key: old -> new`.

    `training.steps` is one of them where the schedule falls until the end of the run.
    """
    schedule = config.lr_schedule
    names = ["lr_schedule.", "optimizer.lr:", "training.global_batch_size:", "training.batch_size_rampup"]
    if schedule.kind == "wsd" or (schedule.kind in ("linear", "cosine") and not schedule.decay):
        names.append("training.steps:")
    return [change for change in _differences(before, config.model_dump(mode="json")) if change.startswith(tuple(names))]


def load_run(engine: Engine, checkpoint: Checkpoint) -> RunState:
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
            optimizer.load(kind, checkpoint.source(kind) if average else _Moments(checkpoint, kind))
            continue
        optimizer.load(kind, checkpoint.source("weights") if average else _Zeros())
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


def save_run(engine: Engine, state: RunState, assets: dict[str, bytes]) -> Path:
    """Write a checkpoint and delete the oldest ones. Collective; raises on every rank if any rank fails."""
    config = engine.config
    folder = checkpoint_folder(checkpoints_folder(config), state.step)
    tensors = (
        TensorToSave(kind, piece.part.name, piece.part.shape, piece.box, values)
        for kind in engine.optimizer.state_kinds
        for piece, values in engine.optimizer.state_pieces(kind)
        if piece.part.replica_rank == 0
    )
    save_checkpoint(
        folder, tensors, run_state=asdict(state), config=config.model_dump(mode="json"), assets=assets, world=engine.grid.world
    )
    if engine.grid.world.first:
        try:
            prune_checkpoints(folder.parent, config.checkpoint.keep_last)
        except OSError as error:  # the new checkpoint is whole; that an old one stays is no reason to end the run
            logger.warning("could not delete old checkpoints in %s: %s", folder.parent, error)
    return folder
