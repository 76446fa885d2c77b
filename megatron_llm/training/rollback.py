"""Past a leap of the loss: back to the last checkpoint, and on with the rows that come after. Called by `training/loop.py`.

As PaLM's authors did by hand (Chowdhery et al. 2022, arXiv 2204.02311, 5.1): they went back some hundred steps and left out the
batches around the spike, because the same rows did no harm to other weights. All ranks see the same losses and so decide alike,
without a message.
"""

from __future__ import annotations

import math
import statistics

from megatron_llm.config import LossSpikeConfig
from megatron_llm.training.agreement import AgreedError
from megatron_llm.training.build import Engine
from megatron_llm.training.progress import Progress
from megatron_llm.training.recovery import choose_checkpoint, load_run, newest_checkpoint
from megatron_llm.training.step import RunState


def find_spike(state: RunState, loss: float, spike: LossSpikeConfig | None) -> str:
    """What is wrong if the loss of the last step leaps out of those before; "" if nothing is. Pure."""
    if spike is None or len(state.losses) < spike.window or not math.isfinite(loss):
        return ""
    last = state.losses[-spike.window :]
    mean, deviation = statistics.fmean(last), statistics.pstdev(last)
    if loss <= mean + spike.threshold * deviation:
        return ""
    return (
        f"the loss of step {state.step}, {loss:.4f}, exceeds the mean {mean:.4f} of the {spike.window} before by more than "
        f"{spike.threshold:g} standard deviations of {deviation:.4f}"
    )


def remember_loss(state: RunState, loss: float, spike: LossSpikeConfig | None) -> None:
    """Add the loss of a step that stays to those that the next ones are compared with.

    Without a rule none is kept: were it turned on again later, those of long ago would not be the last ones.
    """
    if spike is None:
        state.losses = []
    elif math.isfinite(loss):
        state.losses = [*state.losses, loss][-spike.window :]


def go_back(engine: Engine, state: RunState, why: str, progress: Progress) -> RunState | None:
    """Load the newest checkpoint of this run into the engine. Collective.

    Returns the state to go on with: the checkpoint's, but with the next rows that were not read yet, and a record of those
    that are thereby left out. None if there is no checkpoint. Raises AgreedError if this was done too often.
    """
    spike = engine.config.training.loss_spike
    assert spike is not None
    if len(state.skipped_rows) >= spike.max_rollbacks:
        raise AgreedError(
            f"{why}; the run went back {len(state.skipped_rows)} times already (training.loss_spike.max_rollbacks: "
            f"{spike.max_rollbacks}) and left out the rows {ranges(state.skipped_rows)}. If the data are sound, lower "
            "optimizer.lr, lengthen the warm-up or raise training.loss_spike.threshold"
        )
    config = engine.config
    checkpoint = choose_checkpoint(lambda damaged: newest_checkpoint(config, damaged), config, engine.grid.world, progress)
    if checkpoint is None:
        return None
    engine.optimizer.load("weights", checkpoint.state("weights"), progress)
    back = load_run(engine, checkpoint, progress)
    # The rows of an earlier way from the same checkpoint are on record already.
    start = max([back.rows, *(stop for _, stop in state.skipped_rows)])
    back.skipped_rows = [*state.skipped_rows, [start, state.rows]]
    back.rows = state.rows
    return back


def ranges(rows: list[list[int]]) -> str:
    """`[16, 32), [64, 80)`."""
    return ", ".join(f"[{start}, {stop})" for start, stop in rows)
