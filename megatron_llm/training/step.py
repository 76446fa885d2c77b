"""One optimizer step: the heart of the engine. Called by `training/loop.py`; what measures without training is `evaluation.py`.

    for every micro-batch: forward, backward of the *unnormalized* weighted sum of token losses      (pipeline runtime)
                           (with noise and penalties, if training.regularization has any)
                           (in float16 of a multiple of it, see optim/loss_scale.py)
    reduce-scatter gradients, add replicas' partial ones                                             (optim/zero1.py)
    one all-reduce of (loss sum, weight sum, squared norm, votes: stop? saved?)
    scale = clip / weight sum;  update;  all-gather weights

Because the division by the sum of weights happens once, at the end, and over the global batch, nothing depends on how
rows fall into micro-batches and ranks. The same all-reduce tells all ranks alike whether the numbers are finite; if not,
nothing is updated. What a run does about that: `training/nonfinite.py`, `training/rollback.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_llm.config import Config
from megatron_llm.data.stream import TokenStream
from megatron_llm.models.regularization import Regularization
from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.ops.kernels import deterministic_algorithms
from megatron_llm.optim.loss_scale import INITIAL_LOSS_SCALE, loss_scale, next_loss_scale
from megatron_llm.optim.lr_schedule import learning_rate
from megatron_llm.parallel.collectives import all_reduce
from megatron_llm.pipeline.schedules import Schedule
from megatron_llm.pipeline.timeline import Event
from megatron_llm.training.build import Engine, compute_dtype
from megatron_llm.training.microbatches import Microbatches


@dataclass
class RunState:
    """What a checkpoint keeps besides tensors; data order and learning rates are computed from it.

    Attributes:
        step: steps taken; updates: those of them that changed the weights; rows: rows consumed, by which the next one is
            found; tokens: of the rows trained on.
        skipped: steps without a finite loss or gradient; skipped_in_a_row: those since the last update. (Steps that had no
            weighted token are in neither: there are step - updates - skipped of them.)
        loss_scale, finite_in_a_row: see `next_loss_scale`; they move in float16 only.
        evaluation_due: this step is to be evaluated, or sampled, when the run goes on, as it was stopped there.
        losses: finite ones of the last steps, the oldest first, kept if `training.loss_spike` is set.
        skipped_rows: [start, stop) ranges of rows that were consumed and not trained on, since the loss leapt in their steps.
    """

    step: int = 0
    updates: int = 0
    rows: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss_scale: float = INITIAL_LOSS_SCALE
    finite_in_a_row: int = 0
    evaluation_due: bool = False
    losses: list[float] = field(default_factory=list)
    skipped_rows: list[list[int]] = field(default_factory=list)

    @property
    def trained_rows(self) -> int:
        """Rows trained on. The batch size and the learning rate follow them, as if there were no others."""
        return self.rows - sum(stop - start for start, stop in self.skipped_rows)


@dataclass(frozen=True)
class StepResult:
    """Attributes:
    loss: mean loss per weighted token of the global batch; nan if nothing carried weight.
    grad_norm: norm of the gradient of that mean, before clipping.
    rows: size of the global batch.
    lr: learning rate used. skipped: the weights were left alone (no weighted token, or a number that is not finite).
    votes: how many ranks said yes to each of the votes.
    finite: loss and gradient are finite.
    loss_scale: what the loss was multiplied with; 1 unless in float16.
    local_sums: this rank's share of (loss sum, weight sum), [2] on the device.
    """

    loss: float
    grad_norm: float
    rows: int
    lr: float
    skipped: bool
    votes: tuple[int, ...]
    finite: bool
    loss_scale: float
    local_sums: Tensor


def train_step(
    engine: Engine, stream: TokenStream, state: RunState, votes: Sequence[bool] = (), trace: list[Event] | None = None
) -> StepResult:
    """Train on the next global batch and advance `state`. Every rank calls it and gets the same result.

    votes: what this rank has to say besides; they travel with the loss, so that all ranks learn of them in the same step.
    trace: gets what this rank's pipeline does, and when; given on all ranks or on none.
    """
    config = engine.config
    rows = range(state.rows, state.rows + config.training.batch_size(state.trained_rows))
    scale = loss_scale(config.precision, state.loss_scale)
    engine.optimizer.zero_gradients()
    chosen = Regularization.of(config)
    sums = _run_microbatches(engine, engine.schedules[len(rows)], stream, rows, scale, trace, chosen)
    squares = engine.optimizer.reduce_gradients()
    said = torch.tensor([float(vote) for vote in votes], dtype=sums.dtype, device=sums.device)
    totals = all_reduce(torch.cat((sums, squares.to(sums).view(1), said)), engine.grid.world).tolist()
    loss_sum, weight_sum, square_sum, *counts = totals

    finite = math.isfinite(loss_sum) and 0 <= square_sum < math.inf
    divisor = weight_sum * scale
    norm = math.sqrt(square_sum) / divisor if divisor and square_sum >= 0 else math.nan
    skipped = not (finite and weight_sum)
    lr = next_rate(config, state)
    if not skipped:
        state.updates += 1
        clip = config.optimizer.grad_clip
        coefficient = min(1.0, clip / norm) if clip and norm else 1.0
        engine.optimizer.update(state.updates, lr, coefficient / divisor)
    _advance(config, state, rows, finite, skipped)
    loss = loss_sum / weight_sum if weight_sum else math.nan
    return StepResult(loss, norm, len(rows), lr, skipped, tuple(map(int, counts)), finite, scale, sums)


def _advance(config: Config, state: RunState, rows: range, finite: bool, skipped: bool) -> None:
    """Count the step that was taken on `rows`."""
    precision = config.precision
    state.step += 1
    state.rows = rows.stop
    state.tokens += len(rows) * config.training.sequence_length
    if not finite:
        state.skipped += 1
        state.skipped_in_a_row += 1
    elif not skipped:
        state.skipped_in_a_row = 0
    # A step without weighted tokens says nothing about what fits into float16.
    if precision.compute == "float16" and precision.loss_scale == "dynamic" and not (finite and skipped):
        window = precision.loss_scale_window
        state.loss_scale, state.finite_in_a_row = next_loss_scale(state.loss_scale, state.finite_in_a_row, finite, window)


def next_rate(config: Config, state: RunState) -> float:
    """Learning rate of the step that comes next; of a schedule in tokens, the one at the end of the step's tokens."""
    training, schedule, peak, rows = config.training, config.lr_schedule, config.optimizer.lr, state.trained_rows
    assert peak != "auto", "optimizer.lr: auto is resolved before anything else"
    if schedule.unit == "steps":
        return learning_rate(state.updates + 1, peak, schedule, training.steps)
    # What is left of the run is added to what was really read: the batch size may have changed at a restart.
    end = training.rows_after(max(0, training.steps - state.step), rows) * training.sequence_length
    position = state.tokens + training.batch_size(rows) * training.sequence_length
    return learning_rate(position, peak, schedule, end)


def _run_microbatches(
    engine: Engine,
    schedule: Schedule,
    stream: TokenStream,
    rows: Sequence[int],
    scale: float = 1.0,
    trace: list[Event] | None = None,
    regularization: Regularization | None = None,
) -> Tensor:
    """Send the rows of a global batch that belong to this replica through the pipeline.

    scale: factor on what is backpropagated. regularization: what a training step adds; the sums have nothing of its penalties.

    Returns this rank's share of (loss sum, weight sum): [2] in `stat_dtype`; the first tp rank of each last stage
    contributes, the others hold zeros.
    """
    dtype = stat_dtype(compute_dtype(engine.config, engine.device))
    sums = torch.zeros(2, dtype=dtype, device=engine.device)
    microbatches = Microbatches(engine, stream, rows)

    def forward(number: int, microbatch: int, x: Tensor | None) -> Tensor:
        batch, stage = microbatches.batch(number, microbatch), engine.stages[number]
        hidden = stage(x, batch, before_layer=engine.runtime.before_layer, regularization=regularization)
        if not stage.last:
            return hidden
        objective, loss = stage.objective(hidden, batch, regularization, scale)
        if engine.grid.tp.first:
            sums.add_(torch.stack((loss, batch.weights_T.sum().to(dtype))))
        return objective

    with deterministic_algorithms(engine.config.kernels.deterministic and engine.device.type == "cuda"):
        engine.runtime.run(schedule, forward, trace)
    return sums
