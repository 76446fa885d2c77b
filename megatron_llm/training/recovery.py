"""Saving a run and continuing it. Called by `training/loop.py`."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.folders import checkpoint_folder, latest_checkpoint, prune_checkpoints
from megatron_llm.checkpoint.load import Checkpoint, open_checkpoint
from megatron_llm.checkpoint.save import TensorToSave, save_checkpoint
from megatron_llm.config import Config, ConfigError
from megatron_llm.optim.zero1 import STATE_KINDS
from megatron_llm.training.build import Engine
from megatron_llm.training.step import RunState

logger = logging.getLogger("megatron_llm")


def checkpoints_folder(config: Config) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(config.logging.run_dir) / "checkpoints"


def find_resume(config: Config) -> Checkpoint | None:
    """The checkpoint to continue from, if the config says so and there is one.

    Raises ConfigError if it belongs to another model; other changed settings are logged.
    """
    if config.checkpoint.resume == "never":
        return None
    folder = latest_checkpoint(checkpoints_folder(config))
    if folder is None:
        return None
    checkpoint = open_checkpoint(folder)
    changes = _differences(checkpoint.config, config.model_dump(mode="json"))
    foreign = [change for change in changes if change.startswith("model.") and not change.startswith("model.hf")]
    if foreign:
        raise ConfigError(
            [
                f"{folder} holds another model ({change}); choose another logging.run_dir or set checkpoint.resume=never"
                for change in foreign
            ]
        )
    for change in changes:
        logger.warning("changed since %s was saved: %s", folder, change)
    return checkpoint


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


def load_run(engine: Engine, checkpoint: Checkpoint) -> RunState:
    """Fill weights and moments from a checkpoint of any layout, and return where the run stood. Collective."""
    for kind in STATE_KINDS:
        engine.optimizer.load(kind, checkpoint.source(kind))
    return RunState(**checkpoint.run_state)


def save_run(engine: Engine, state: RunState, assets: dict[str, bytes]) -> Path:
    """Write a checkpoint and delete the oldest ones. Collective; raises on every rank if any rank fails."""
    config = engine.config
    folder = checkpoint_folder(checkpoints_folder(config), state.step)
    tensors = (
        TensorToSave(kind, piece.part.name, piece.part.shape, piece.box, values)
        for kind in STATE_KINDS
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
