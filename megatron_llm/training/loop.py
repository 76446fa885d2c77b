"""A run from its first step to its last, or to the signal that stops it. Called by `cli/train.py`.

Exit codes: 0 done, 75 stopped by a signal or `training.max_minutes` after saving (run the same command again to continue; 0
under `torchrun --max-restarts`). Failures are exceptions; `RUN/status.json` carries the outcome of each.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_llm.checkpoint.load import Checkpoint
from megatron_llm.checkpoint.save import SaveError
from megatron_llm.checkpoint.saver import Saver
from megatron_llm.config import Config
from megatron_llm.data.stream import TokenStream, build_train_stream, build_valid_streams
from megatron_llm.models.stages import parameters
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.timeline import Event
from megatron_llm.training.agreement import AgreedError, check_same_config
from megatron_llm.training.build import Engine, build_engine, compute_dtype
from megatron_llm.training.changes import Changes, changes_rates
from megatron_llm.training.distributed import (
    exit_code_of_stopped_run,
    launched_at,
    launched_rank,
    may_restart,
    pick_device,
    process_group,
)
from megatron_llm.training.evaluation import Score, evaluate
from megatron_llm.training.hang_watch import HangWatch
from megatron_llm.training.metrics import Metrics, setup_logging
from megatron_llm.training.nonfinite import end_if_hopeless
from megatron_llm.training.progress import Progress
from megatron_llm.training.recovery import (
    changes_since,
    check_source,
    choose_checkpoint,
    find_resume,
    known_facts,
    load_run,
    make_pruner,
    probe_checkpoints,
    start_save,
)
from megatron_llm.training.replicas import check_replicas
from megatron_llm.training.resolve import ResolvedRun
from megatron_llm.training.rollback import find_spike, go_back, ranges, remember_loss
from megatron_llm.training.run_folder import RunFolder, entered_since, restarted
from megatron_llm.training.samples import Samples, make_samples
from megatron_llm.training.signals import StopRequest, time_limit
from megatron_llm.training.step import RunState, StepResult, next_rate, train_step
from megatron_llm.training.stragglers import Stragglers
from megatron_llm.training.trace import write_trace

logger = logging.getLogger("megatron_llm")
STOP, SAVED = 0, 1  # what the ranks vote on in every step: to stop; that a save has come to the end of its stage


@dataclass
class Run:
    """Everything that the steps of a run share.

    Attributes:
        assets, facts: what travels with checkpoints (`known_facts`).
        metrics: on rank 0 only.
        saved_step: of the last checkpoint that was begun.
        changes: settings that decide the numbers and are not those of the checkpoint.
        samples: on all ranks, if `logging.sample_every` is set.
    """

    engine: Engine
    state: RunState
    train_stream: TokenStream
    valid_streams: dict[str, TokenStream]
    assets: dict[str, bytes]
    facts: dict[str, Any]
    metrics: Metrics | None
    stop: StopRequest
    saver: Saver
    saved_step: int | None
    folder: RunFolder
    changes: list[str]
    stragglers: Stragglers
    samples: Samples | None = None
    watch: HangWatch = field(default_factory=HangWatch)

    @property
    def config(self) -> Config:
        return self.engine.config

    def report(self, outcome: str, **details: Any) -> None:
        """Say in the status how the run stands, and what in it is not as a reader of the config would think. On rank 0."""
        if self.metrics is not None:
            notable = {"changes": self.changes, "skipped_rows": self.state.skipped_rows}
            self.folder.report(outcome, **details, **{name: value for name, value in notable.items() if value})


def train(resolved: ResolvedRun, allow_change: bool = False) -> int:
    """Train as configured, continuing from the newest checkpoint of the run folder. Returns the exit code.

    allow_change: go on although settings that decide the numbers are not those of the checkpoint.
    """
    again = may_restart() and entered_since(resolved.config, launched_at())
    config = restarted(resolved.config) if again else resolved.config
    setup_logging(launched_rank())
    device = pick_device(config.device)
    with RunFolder(config, launched_rank(), again) as folder:
        # Whatever a user can still mend is checked before ranks wait for each other.
        fresh_assets = {} if find_resume(config, allow_change) else resolved.assets()
        probe_checkpoints(config)
        with (
            process_group(device, config.parallel.timeout_seconds, folder.fail),
            # Not earlier: a rank that waits for one that failed must end when the launcher says so.
            StopRequest(*time_limit(config.training.max_minutes, launched_at()), folder.fail) as stop,
        ):
            folder.joined()
            check_same_config(resolved.config)
            run = _begin(replace(resolved, config=config), allow_change, fresh_assets, device, folder, stop)
            with _closing(run.metrics):
                stopped = _train(run)
            del run  # the groups can go
    return exit_code_of_stopped_run() if stopped else 0


@contextmanager
def _closing(metrics: Metrics | None) -> Iterator[None]:
    """Let the sinks of a run finish, however it ends."""
    failed = True
    try:
        yield
        failed = False
    finally:
        if metrics is not None:
            metrics.close(failed)


def _train(run: Run) -> bool:
    """All steps, and the report of how they ended. Returns whether the run was stopped."""
    with HangWatch(run.config.training.hang_timeout, run.folder, lambda: run.state.step) as run.watch:
        run.engine.runtime.after_action = run.watch.progress
        stopped = _steps_and_saves(run)
    if stopped:
        run.report("stopped", step=run.state.step, reason=run.stop.reason)
    else:
        run.report("done", step=run.state.step)
    return stopped


def _begin(
    resolved: ResolvedRun,
    allow_change: bool,
    fresh_assets: dict[str, bytes],
    device: torch.device,
    folder: RunFolder,
    stop: StopRequest,
) -> Run:
    """Everything up to the first step: agree, verify, assemble, load, and say so. Collective."""
    config = resolved.config
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    verifying, prune = Progress("verifying the checkpoint"), make_pruner(config)
    checkpoint = choose_checkpoint(lambda damaged: find_resume(config, allow_change, damaged), config, grid.world, verifying)
    if checkpoint is None and isinstance(resolved.source, Checkpoint):
        check_source(resolved.source, config, grid.world, verifying)
    weights = checkpoint.state("weights") if checkpoint else resolved.weights()
    engine = build_engine(config, grid, device, weights, Progress("loading weights"))
    state = load_run(engine, checkpoint, Progress("loading the optimizer")) if checkpoint else RunState()
    changes = changes_since(checkpoint, config) if checkpoint else Changes()
    run = Run(
        engine=engine,
        state=state,
        train_stream=build_train_stream(config),
        valid_streams=build_valid_streams(config),
        assets=checkpoint.assets if checkpoint else fresh_assets,
        facts=known_facts(config),
        metrics=Metrics(config, grid.world.size, device, state.step) if grid.world.first else None,
        stop=stop,
        saver=Saver(grid.world, config.checkpoint.asynchronous, prune, Progress("saving", lambda: run.watch.progress())),
        saved_step=state.step if checkpoint else None,
        folder=folder,
        changes=changes.decides_numbers,
        stragglers=Stragglers(grid, device, config.logging),
    )
    with ExitStack() as failure:
        if run.metrics:
            failure.callback(run.metrics.close, True)  # a sink may be what keeps a process from ending
        if config.logging.sample_every:
            run.samples = make_samples(engine, run.assets, state.step, lambda: run.watch.progress())
        if grid.world.first:
            folder.write_config(config)
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            folder.record_start(state.step, grid.world.size, name)
            if checkpoint:
                prune(checkpoint.folder)  # what was interrupted
        _announce(run, resolved, checkpoint, changes.free)
        run.report("running")
        failure.pop_all()
    return run


def _announce(run: Run, resolved: ResolvedRun, resumed: Checkpoint | None, changes: list[str]) -> None:
    """Say what is about to be trained, and how that differs from what the checkpoint was trained for.

    changes: those that decide no numbers.
    """
    config, grid = run.config, run.engine.grid
    held = parameters(run.engine.stages)
    local, trained = (sum(p.numel() for p in held if p.requires_grad or not only) for only in (False, True))
    dtype = str(compute_dtype(config, run.engine.device)).removeprefix("torch.")
    pipeline = f"pp {grid.pp.size}" + (f" ({config.parallel.pipeline_schedule})" if grid.pp.size > 1 else "")
    logger.info(
        f"{grid.world.size} ranks: tp {grid.tp.size}, {pipeline}, dp {grid.dp.size} on {run.engine.device}, {dtype} | "
        f"{run.engine.microbatches} micro-batches of {config.training.micro_batch_size} rows a step | "
        f"{local:,} parameters on rank 0" + (f", of which {trained:,} are trained" if trained < local else "")
    )
    for line in run.engine.attention:
        logger.info("attention: %s", line)
    if ramp := config.training.batch_size_rampup:
        logger.info(
            f"the batch grows from {ramp.start} rows to {config.training.global_batch_size} over the first {ramp.rows:,} rows, "
            f"{ramp.increment} at a time; the next step has {config.training.batch_size(run.state.trained_rows)}"
        )
    for line in run.train_stream.summary:
        logger.info("data: %s", line)
    for line in resolved.notes:
        logger.info(line)  # every rank has the same
    if not resumed and isinstance(resolved.source, Checkpoint):
        logger.info("starting from the weights of %s", resolved.source.folder)
    if resumed:
        logger.info("continuing from %s", resumed.folder)
        for change in changes:
            logger.info("changed since: %s", change)
    if run.state.skipped_rows:
        logger.warning("rows left out so far, because the loss leapt: %s", ranges(run.state.skipped_rows))
    for change in run.changes:
        logger.warning("changed since, and allowed: %s", change)
    if changes_rates(run.changes):
        logger.warning(
            "the learning-rate schedule is not the one before; the next step has lr %.3g", next_rate(config, run.state)
        )


def _steps_and_saves(run: Run) -> bool:
    """Train until the last step or a signal, and until all is saved. Returns whether a signal ended it."""
    try:
        return _steps(run)
    except SaveError as error:
        raise AgreedError(str(error)) from error
    except AgreedError:
        try:
            run.saver.finish()  # all ranks are here, and the last good state is worth waiting for
        except SaveError as error:
            logger.warning("%s", error)
        raise
    finally:
        run.saver.abandon()


def _steps(run: Run) -> bool:
    """Train until the last step or a signal, evaluating and saving on the way. Returns whether a signal ended it."""
    training = run.config.training
    sample_every = run.config.logging.sample_every
    if run.state.step == 0 or run.state.evaluation_due:
        values = _evaluate(run) if run.state.step == 0 or _due(training.eval_every, run.state.step) else {}
        if values and run.metrics:
            run.metrics.add(run.state, values)
        if run.samples and _due(sample_every, run.state.step):
            run.samples.take(run.state.step)
    run.state.evaluation_due = stopped = False
    while run.state.step < training.steps and not stopped:
        result, values = _step(run)
        why = find_spike(run.state, result.loss, training.loss_spike)
        if why and _go_back(run, why):
            continue
        remember_loss(run.state, result.loss, training.loss_spike)
        last = run.state.step == training.steps
        stopped = bool(result.votes[STOP]) and not last
        due, sample_due = _due(training.eval_every, run.state.step), _due(sample_every, run.state.step)
        if last or (due and not stopped):
            values |= _evaluate(run)
        run.state.evaluation_due = stopped and (due or sample_due)
        if run.metrics:
            run.metrics.write(values)
        if not result.finite:
            end_if_hopeless(run.engine, run.state, result)
        if _due(training.check_replicas_every, run.state.step):
            check_replicas(run.engine)
        if last or stopped or _due(run.config.checkpoint.every_steps, run.state.step):
            _save(run, wait=last or stopped)
        if run.samples and (last or (sample_due and not stopped)):
            run.samples.take(run.state.step)
    run.engine.optimizer.wait_weights()  # no rank leaves while others still receive from it
    _save(run, wait=True)  # of a run without steps
    return stopped


def _due(every: int, step: int) -> bool:
    """Whether what happens every so many steps, 0: never, happens after this one."""
    return every > 0 and step % every == 0


def _step(run: Run) -> tuple[StepResult, dict[str, Any]]:
    """Take a step: what came of it, and on rank 0 its metrics."""
    engine, state = run.engine, run.state
    trace: list[Event] | None = [] if state.step + 1 in run.config.logging.trace_steps else None
    before = engine.grid.traffic()
    start = time.perf_counter()
    votes = {STOP: run.stop.requested, SAVED: run.saver.ready}
    with run.stragglers.around(state.step + 1):
        result = train_step(engine, run.train_stream, state, list(votes.values()), trace)
    seconds = time.perf_counter() - start
    if trace is not None:
        write_trace(run.config.logging.run_dir, state.step, trace, engine.schedules[result.rows], engine.grid)
    traffic = {axis: now - before[axis] for axis, now in engine.grid.traffic().items()}
    busy = run.stragglers.look(state.step)
    if result.votes[SAVED] == engine.grid.world.size:
        run.saver.advance()
    if run.metrics is None:
        return result, {}
    return result, run.metrics.step(state, result, seconds, traffic, run.saver.stall_seconds()) | busy


def _go_back(run: Run, why: str) -> bool:
    """Undo the steps since the last checkpoint and leave out their rows; False if there is no checkpoint yet.

    The state is saved with the next checkpoint. Whoever starts again before has the same losses, and goes back alike.
    """
    undone = run.state.step
    run.saver.finish()
    back = go_back(run.engine, run.state, why, Progress("going back", run.watch.progress))
    if back is None:
        logger.warning("%s; there is no checkpoint to go back to yet: going on", why)
        return False
    logger.warning("%s: back to step %d, leaving out rows %s", why, back.step, ranges(back.skipped_rows[-1:]))
    run.state, run.saved_step = back, back.step
    if run.metrics:
        run.metrics.forget_after(back.step)
        if run.samples:
            run.samples.forget_after(back.step)
        run.metrics.write({"step": undone, "back_to_step": back.step, "skipped_rows": back.skipped_rows})
    run.report("running")
    return True


def _evaluate(run: Run) -> dict[str, Any]:
    """The scores of every validation set, and of all together; nothing if they say nothing of any token."""
    values: dict[str, Any] = {}
    total = Score()
    for name, stream in run.valid_streams.items():
        found = evaluate(run.engine, stream, Progress(f"evaluating on {name}"))
        values |= found.metrics(name)
        total += found.score
        logger.info("step %d | %s: %s", run.state.step, name, found)
    if all(value is None for value in values.values()):
        return {}
    if len(run.valid_streams) > 1:
        logger.info("step %d | all validation sets: %s", run.state.step, total)
    return values | total.metrics()


def _save(run: Run, wait: bool) -> None:
    """Begin to save, or wait until all is saved; but this very step only once."""
    if run.saved_step != run.state.step:
        run.saved_step = run.state.step
        start_save(run.saver, run.engine, run.state, run.assets, run.facts, wait)
    elif wait:
        run.saver.finish()
