"""The end of a run whose numbers stay bad, with a report of where they are. Called by `training/loop.py`.

A single step without a finite loss or gradient is skipped and counted (`training/step.py`); `training.max_skipped_steps` of
them in a row mean that the weights, the data or the machine are broken. Nothing is exchanged before that moment.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.objects import all_gather_objects
from megatron_llm.training.agreement import AgreedError
from megatron_llm.training.build import Engine
from megatron_llm.training.step import RunState, StepResult

_NAMED = 5  # parameters of each sort


@dataclass
class _Share:
    """What one rank knows of a step.

    place: its coordinates in the mesh. loss, weight: its sums. squares: of the finite elements of its gradients, by logical
    name. bad: how many are not finite, by logical name, where there are any.
    """

    place: str
    loss: float
    weight: float
    squares: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)


def end_if_hopeless(engine: Engine, state: RunState, result: StepResult) -> None:
    """Raise AgreedError on all ranks if this was the last of too many bad steps in a row.

    Called when a step's numbers were not finite, before the next step clears the gradients. Collective if it raises.
    """
    limit = engine.config.training.max_skipped_steps
    if limit and state.skipped_in_a_row >= limit:
        shares = all_gather_objects(_local_share(engine, result), engine.grid.world)
        raise AgreedError(_report(shares, state, result, limit))


@torch.no_grad()
def _local_share(engine: Engine, result: StepResult) -> _Share:
    loss, weight = result.local_sums.tolist()
    share = _Share(_place(engine.grid), loss, weight)
    for name, values in engine.optimizer.owned_gradients():
        finite = values.isfinite()
        squares = values.where(finite, 0).double().square().sum()
        total, bad = torch.stack((squares, (~finite).sum().double())).tolist()
        share.squares[name] += total
        if bad:
            share.bad[name] += int(bad)
    return share


def _place(grid: Grid) -> str:
    return f"rank {grid.world.rank} (pp {grid.pp.rank}, dp {grid.dp.rank}, tp {grid.tp.rank})"


def _report(shares: list[_Share], state: RunState, result: StepResult, limit: int) -> str:
    """What a user should know to find the cause."""
    squares = sum((share.squares for share in shares), Counter[str]())
    bad = sum((share.bad for share in shares), Counter[str]())
    weight = sum(share.weight for share in shares) or 1.0
    norms = Counter({name: math.sqrt(value) / (weight * result.loss_scale) for name, value in squares.items()})
    lines = [
        f"{state.skipped_in_a_row} steps in a row (training.max_skipped_steps: {limit}) had no finite loss or gradient; the last "
        f"was step {state.step} on rows [{state.rows - result.rows}, {state.rows}), with a loss of {result.loss:g}",
        "loss not finite on: " + _listed([share.place for share in shares if not math.isfinite(share.loss)]),
        "gradient not finite, as far as each rank owns it, on: " + _listed([share.place for share in shares if share.bad]),
        "parameters with gradient elements that are not finite: "
        + _listed([f"{name} ({count:,})" for name, count in bad.most_common()], _NAMED),
        "largest gradient norms of the finite elements: "
        + _listed([f"{name} {norm:.3g}" for name, norm in norms.most_common(_NAMED)]),
        _way_out(state, result),
    ]
    return "\n".join(lines)


def _way_out(state: RunState, result: StepResult) -> str:
    scale = f"; the loss scale is down to {result.loss_scale:g}" if result.loss_scale != 1.0 else ""
    return (
        f"{state.updates} updates were made in all{scale}. If the weights of the last checkpoint are sound, go on from it with "
        "a lower optimizer.lr, other data, or precision.compute bfloat16 or float32; if only some ranks are named, look at their "
        "machines"
    )


def _listed(items: list[str], most: int = 8) -> str:
    shown = ", ".join(items[:most]) or "none"
    return shown + (f" and {len(items) - most:,} more" if len(items) > most else "")
