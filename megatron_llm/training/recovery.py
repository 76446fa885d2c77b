"""Saving a run and continuing it: from which checkpoint, whether it fits, what is loaded.

Called by `training/loop.py` and `training/rollback.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from megatron_llm.checkpoint.folders import checkpoint_folder, list_checkpoints, prune_checkpoints
from megatron_llm.checkpoint.load import Checkpoint, open_checkpoint
from megatron_llm.checkpoint.save import Contents, TensorToSave
from megatron_llm.checkpoint.saver import Saver
from megatron_llm.checkpoint.work import Work
from megatron_llm.config import Config, ConfigError, parse_config
from megatron_llm.data.stream import describe_data
from megatron_llm.ops.storage import Folder
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.objects import all_gather_objects
from megatron_llm.parallel.shard import Box, Part
from megatron_llm.training.agreement import AgreedError
from megatron_llm.training.build import Engine, compute_dtype
from megatron_llm.training.changes import Changes, find_changes
from megatron_llm.training.distributed import launched_rank
from megatron_llm.training.progress import Progress
from megatron_llm.training.run_folder import checkpoints_folder
from megatron_llm.training.step import RunState

logger = logging.getLogger("megatron_llm")


def probe_checkpoints(config: Config) -> None:
    """Find out before training whether this rank can write where checkpoints go. Raises ValueError naming the place."""
    place, name = checkpoints_folder(config), f".probe-{launched_rank():05d}"
    try:
        try:
            _write_and_remove(place, name)
        except FileNotFoundError:  # rank 0 has just set the folder of an earlier run aside, with `resume: never`
            _write_and_remove(place, name)
    except Exception as error:  # file systems have errors of their own
        key = "logging.run_dir" if config.checkpoint.path is None else "checkpoint.path"
        raise ValueError(f"{key}: no checkpoint can be written to {place}: {type(error).__name__}: {error}") from error


def _write_and_remove(place: Folder, name: str) -> None:
    place.make()
    with place.create(name):
        pass
    place.remove(name)


def find_resume(config: Config, allow_change: bool = False, damaged: Mapping[str, str] | None = None) -> Checkpoint | None:
    """The checkpoint to continue from, if the config says so and there is one; its content has not been read yet.

    damaged: see `newest_checkpoint`.

    Raises ConfigError if all that were saved are damaged, or with `resume: strict` the newest; if the checkpoint belongs to
    another model, or to rows of another length, by which data order is counted; or if a changed setting would make it another
    run, unless that is allowed.
    """
    if config.checkpoint.resume == "never":
        return None
    checkpoint = newest_checkpoint(config, damaged or {})
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
            [*problems, f"no checkpoint in {place} is whole: restore one, or start anew with checkpoint.resume=never"]
        )
    return None


def changes_since(checkpoint: Checkpoint, config: Config) -> Changes:
    """What a run that goes on from a checkpoint changes. Raises ConfigError if no run has saved it that this version knows."""
    if "training" not in checkpoint.config:
        raise ConfigError(
            [
                f"{checkpoint.folder} holds weights only, no run that could go on: start from it with model.checkpoint, and keep "
                "it out of the checkpoints of the new run"
            ]
        )
    try:
        saved = parse_config(checkpoint.config)  # with the defaults of settings that are younger
    except ConfigError as error:
        raise ConfigError(
            [f"{checkpoint.folder}, written by {checkpoint.versions}: {problem}" for problem in error.problems]
        ) from error
    return find_changes(saved, checkpoint.facts, config, known_facts(config))


def known_facts(config: Config) -> dict[str, Any]:
    """What decides the numbers and is not said by the settings: what is in the data, and what `auto` stands for here."""
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    dtype = compute_dtype(config, torch.device("cuda" if on_gpu else "cpu"))
    return {**describe_data(config), "precision": {"compute": str(dtype).removeprefix("torch.")}}


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


def choose_checkpoint(
    choose: Callable[[Mapping[str, str]], Checkpoint | None], config: Config, world: Axis, progress: Progress
) -> Checkpoint | None:
    """The checkpoint that rank 0 chooses, on all ranks, when each of its bytes is what was written. Collective.

    Ranks that looked for themselves might see different ones: a folder that not all share, or whose listing is stale.

    choose: gets those that were found damaged, folder -> what is wrong. Raises AgreedError on all ranks if that raises
    ValueError, or if the checkpoint is another one on some rank.
    """
    damaged: dict[str, str] = {}
    while True:
        checkpoint = _as_first_chose(lambda: choose(damaged), world)
        if checkpoint is None:
            return None
        damage = find_damage(checkpoint, config, world, progress)
        if not damage:
            return checkpoint
        damaged[str(checkpoint.folder)] = damage


def _as_first_chose(choose: Callable[[], Checkpoint | None], world: Axis) -> Checkpoint | None:
    chosen: Checkpoint | None = None
    said: tuple[str, ...] = ()
    if world.first:
        try:
            chosen = choose()
            said = (str(chosen.folder), chosen.checksum) if chosen else ()
        except ValueError as error:
            said = (str(error),)
    said = all_gather_objects(said, world)[0]
    if len(said) == 1:
        raise AgreedError(said[0])
    if said and not world.first:
        try:
            chosen = open_checkpoint(said[0])
        except ValueError:
            chosen = None
    check_agreement(chosen, world)
    return chosen


def check_agreement(checkpoint: Checkpoint | None, world: Axis) -> None:
    """Raise AgreedError on all ranks unless all have opened the same checkpoint, or none. Collective."""
    found = all_gather_objects((checkpoint.step, checkpoint.checksum) if checkpoint else None, world)
    if len(set(found)) > 1:
        names = {one: "none" if one is None else f"step {one[0]} ({one[1][:8]})" for one in found}
        said = ", ".join(f"rank {found.index(one)} {name}" for one, name in names.items())
        raise AgreedError(
            f"ranks see different checkpoints to start from: {said}; they must be in a folder that all nodes share "
            "(logging.run_dir, checkpoint.path, model.checkpoint). If it is one, its listing was stale on some node: start again"
        )


def find_damage(checkpoint: Checkpoint, config: Config, world: Axis, progress: Progress) -> str:
    """What is wrong with the content of a checkpoint; "" if nothing is, or nobody wants to know. Collective.

    Ranks share the reading. Raises AgreedError if something cannot be read on some rank: that is not yet a damage.
    """
    if not config.checkpoint.verify:
        return ""

    def read(count: Callable[[int], None]) -> tuple[list[str], str]:
        try:
            return checkpoint.damaged(world.rank, world.size, count), ""
        except Exception as error:  # file systems have errors of their own
            return [], f"{type(error).__name__}: {error}"

    work = Work(read, checkpoint.nbytes // world.size)
    work.wait_for_all(world, progress)
    results = all_gather_objects(work.result(), world)
    unreadable = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error]
    if unreadable:
        raise AgreedError(
            f"{checkpoint.folder} cannot be read ({'; '.join(unreadable)}): start again, and if that does not help, delete its "
            "folder to go on from the checkpoint before"
        )
    return "; ".join(problem for problems, _ in results for problem in problems)


def check_source(source: Checkpoint, config: Config, world: Axis, progress: Progress) -> None:
    """Raise AgreedError on all ranks unless all are about to start from the same, undamaged checkpoint. Collective."""
    check_agreement(source, world)
    if damage := find_damage(source, config, world, progress):
        raise AgreedError(f"model.checkpoint: {damage}. Restore it, or start from another")


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
            optimizer.load(kind, checkpoint.state(kind) if average else _Moments(checkpoint, kind), progress)
            continue
        optimizer.load(kind, checkpoint.state("weights") if average else _Zeros(), progress)
        if engine.grid.world.first:
            reason = f"are of {saved_by}" if kind in checkpoint.kinds else "are not there"
            start = "from the weights" if average else "at zero"
            logger.warning("%r in %s %s: those of %s start %s", kind, checkpoint.folder, reason, name, start)
    try:
        return RunState(**checkpoint.run_state)
    except TypeError as error:
        raise ValueError(
            f"{checkpoint.folder}, written by {checkpoint.versions}, has a state of another kind: {error}"
        ) from error


class _Zeros:
    """A `TensorSource` of zeros."""

    def read(self, part: Part, box: Box) -> Tensor:
        return torch.zeros(box.shape)


class _Moments:
    """The moments of a checkpoint, and zeros for weights that were frozen when it was saved."""

    def __init__(self, checkpoint: Checkpoint, kind: str):
        self._source, self._saved, self._frozen = checkpoint.state(kind), checkpoint.tensors(kind), checkpoint.state("weights")

    def read(self, part: Part, box: Box) -> Tensor:
        if part.name in self._saved:
            return self._source.read(part, box)
        return torch.zeros_like(self._frozen.read(part, box))  # a name that is nowhere is an error


def make_pruner(config: Config) -> Callable[[Folder], None]:
    """What deletes old checkpoints when the one in a folder has been committed, or is gone on from."""
    settings, known = config.checkpoint, set[str]()

    def prune(newest: Folder) -> None:
        try:
            prune_checkpoints(newest, settings.keep_last, settings.keep_every, known)
        except Exception as error:  # the new checkpoint is whole; that an old one stays is no reason to end the run
            logger.warning("could not delete old checkpoints in %s: %s: %s", newest.parent(), type(error).__name__, error)

    return prune


def start_save(
    saver: Saver, engine: Engine, state: RunState, assets: dict[str, bytes], facts: dict[str, Any], wait: bool = False
) -> None:
    """Begin to write a checkpoint, when the one before is committed. Collective; raises SaveError if either fails.

    facts: as `known_facts` gives them. wait: return when it is committed.
    """
    config = engine.config
    folder = checkpoint_folder(checkpoints_folder(config), state.step)
    tensors = (
        TensorToSave(kind, piece.part.name, piece.part.shape, piece.box, values)
        for kind in engine.optimizer.state_kinds
        for piece, values in engine.optimizer.state_pieces(kind)
        if piece.part.replica_rank == 0
    )
    saver.start(folder, tensors, Contents(asdict(state), config.model_dump(mode="json"), assets, facts), wait)
