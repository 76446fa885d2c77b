"""A run from its first step to its last, or to the signal that stops it. Called by `cli/train.py`.

Exit codes: 0 done, 75 stopped by a signal after saving (run the same command again to continue). Failures are
exceptions; `RUN/status.json` carries the outcome of each.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llm.config import Config
from megatron_llm.data.stream import TokenStream, build_train_stream, build_valid_streams
from megatron_llm.hf.assets import collect_assets
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import TensorSource
from megatron_llm.pipeline.timeline import Event
from megatron_llm.training.build import Engine, build_engine, compute_dtype, parameters
from megatron_llm.training.distributed import launched_rank, pick_device, process_group
from megatron_llm.training.metrics import Metrics, setup_logging
from megatron_llm.training.recovery import check_agreement, find_resume, load_run, save_run, schedule_changes
from megatron_llm.training.resolve import ResolvedRun
from megatron_llm.training.run_folder import RunFolder
from megatron_llm.training.signals import EXIT_STOPPED, StopRequest
from megatron_llm.training.step import RunState, evaluate, next_rate, train_step
from megatron_llm.training.trace import write_trace

logger = logging.getLogger("megatron_llm")


@dataclass
class Run:
    """Everything that the steps of a run share. `metrics` exists on rank 0 only."""

    engine: Engine
    state: RunState
    train_stream: TokenStream
    valid_streams: dict[str, TokenStream]
    assets: dict[str, bytes]
    metrics: Metrics | None
    stop: StopRequest
    saved_step: int | None

    @property
    def config(self) -> Config:
        return self.engine.config


def train(resolved: ResolvedRun) -> int:
    """Train as configured, continuing from the newest checkpoint of the run folder. Returns the exit code."""
    config = resolved.config
    setup_logging(launched_rank())
    # Whatever a user can still mend is checked before ranks wait for each other.
    device = pick_device(config.device)
    checkpoint = find_resume(config)
    source = resolved.source.path if resolved.source else None
    assets = checkpoint.assets if checkpoint else collect_assets(source, config.data.tokenizer)
    with (
        RunFolder(config, launched_rank()) as folder,
        process_group(device, config.parallel.timeout_seconds),
        StopRequest() as stop,  # not earlier: a rank that waits for one that failed must end when the launcher says so
    ):
        grid = Grid.build(config.parallel, config.model.num_key_value_heads)
        check_agreement(checkpoint, grid.world)
        weights: TensorSource | None = None
        if checkpoint:
            weights = checkpoint.source("weights")
        elif resolved.source:
            weights = resolved.source.source(config.model)
        engine = build_engine(config, grid, device, weights)
        state = load_run(engine, checkpoint) if checkpoint else RunState()
        metrics = Metrics(config, grid.world.size, device, state.step) if grid.world.first else None
        saved = state.step if checkpoint else None
        run = Run(engine, state, build_train_stream(config), build_valid_streams(config), assets, metrics, stop, saved)
        changes = schedule_changes(checkpoint.config, config) if checkpoint else []
        details = {"schedule_changes": changes} if changes else {}
        _announce(run, resolved.notes, checkpoint.folder if checkpoint else None, changes)
        if grid.world.first and details:
            folder.report("running", **details)
        stopped = _steps(run)
        if grid.world.first:
            folder.report("stopped" if stopped else "done", step=state.step, **details)
    return EXIT_STOPPED if stopped else 0


def _announce(run: Run, notes: tuple[str, ...], resumed: Path | None, changes: list[str]) -> None:
    """Say what is about to be trained, and how that differs from what the checkpoint was trained for."""
    config, grid = run.config, run.engine.grid
    local = sum(parameter.numel() for parameter in parameters(run.engine.stages))
    dtype = str(compute_dtype(config, run.engine.device)).removeprefix("torch.")
    pipeline = f"pp {grid.pp.size}" + (f" ({config.parallel.pipeline_schedule})" if grid.pp.size > 1 else "")
    logger.info(
        f"{grid.world.size} ranks: tp {grid.tp.size}, {pipeline}, dp {grid.dp.size} on {run.engine.device}, {dtype} | "
        f"{run.engine.microbatches} micro-batches of {config.training.micro_batch_size} rows a step | "
        f"{local:,} parameters on rank 0"
    )
    if ramp := config.training.batch_size_rampup:
        logger.info(
            f"the batch grows from {ramp.start} rows to {config.training.global_batch_size} over the first {ramp.rows:,} rows, "
            f"{ramp.increment} at a time; the next step has {config.training.batch_size(run.state.rows)}"
        )
    for line in run.train_stream.summary:
        logger.info("data: %s", line)
    for line in notes:
        logger.warning(line)
    if resumed:
        logger.info("continuing from %s", resumed)
    if changes:
        logger.warning(
            "the learning-rate schedule is not the one before: %s; the next step has lr %.3g",
            ", ".join(changes),
            next_rate(config, run.state),
        )


def _steps(run: Run) -> bool:
    """Train until the last step or a signal, evaluating and saving on the way. Returns whether a signal ended it."""
    training, state = run.config.training, run.state
    if state.step == 0:
        values = _evaluate(run)
        if values and run.metrics:
            run.metrics.write({"step": 0, "tokens": 0, **values})
    stopped = False
    while state.step < training.steps and not stopped:
        trace: list[Event] | None = [] if state.step + 1 in run.config.logging.trace_steps else None
        before = run.engine.grid.traffic()
        start = time.perf_counter()
        result = train_step(run.engine, run.train_stream, state, run.stop.requested, trace)
        seconds = time.perf_counter() - start
        if trace is not None:
            write_trace(run.config.logging.run_dir, state.step, trace, run.engine.schedules[result.rows], run.engine.grid)
        traffic = {axis: now - before[axis] for axis, now in run.engine.grid.traffic().items()}
        values = run.metrics.step(state, result, seconds, traffic) if run.metrics else {}
        stopped = result.stop and state.step < training.steps
        if state.step == training.steps or (training.eval_every and state.step % training.eval_every == 0 and not stopped):
            values |= _evaluate(run)
        if run.metrics:
            run.metrics.write(values)
        every = run.config.checkpoint.every_steps
        if every and state.step % every == 0:
            _save(run)
    _save(run)
    return stopped


def _evaluate(run: Run) -> dict[str, Any]:
    """Loss per weighted token of every validation set, and of all together."""
    values: dict[str, Any] = {}
    total_loss = total_weight = 0.0
    for name, stream in run.valid_streams.items():
        loss_sum, weight_sum = evaluate(run.engine, stream)
        values[f"valid_loss/{name}"] = loss_sum / weight_sum if weight_sum else None
        total_loss, total_weight = total_loss + loss_sum, total_weight + weight_sum
    if not total_weight:
        return {}
    values["valid_loss"] = total_loss / total_weight
    shown = " | ".join(f"{name.removeprefix('valid_loss/')} {value:.4f}" for name, value in values.items() if value is not None)
    logger.info("step %d | %s", run.state.step, shown.replace("valid_loss", "all valid sets"))
    return values


def _save(run: Run) -> None:
    """Save unless this very step is saved already."""
    if run.saved_step == run.state.step:
        return
    start = time.perf_counter()
    folder = save_run(run.engine, run.state, run.assets)
    run.saved_step = run.state.step
    logger.info("saved %s in %.1f s", folder, time.perf_counter() - start)
