"""Pipeline schedules as data: per rank, the list of things it does in a step, in order.

An action `F(stage, microbatch)` runs a stage forward, `B` runs it backward. A schedule knows nothing of tensors: the
same lists are checked (`pipeline/check.py`) and executed (`pipeline/runtime.py`). Called by `training/build.py`.

p stages, m micro-batches; bubble of both schedules here: (p - 1) forward and backward times; activations held at the
peak: m micro-batches (GPipe), min(m, p - stage) (1F1B).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, order=True)
class Action:
    """One forward (F) or backward (B) of one micro-batch through one stage."""

    kind: Literal["F", "B"]
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}(stage {self.stage}, micro-batch {self.microbatch})"


@dataclass(frozen=True)
class Schedule:
    """Attributes:
    placement: the pipeline rank of every stage.
    microbatches: how many go through every stage.
    actions: for every rank, what it does in order.
    """

    placement: tuple[int, ...]
    microbatches: int
    actions: tuple[tuple[Action, ...], ...]


def _one_stage_a_rank(stages: int, microbatches: int, actions: Callable[[int], list[Action]]) -> Schedule:
    return Schedule(tuple(range(stages)), microbatches, tuple(tuple(actions(stage)) for stage in range(stages)))


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019)."""
    return _one_stage_a_rank(
        stages, microbatches, lambda stage: [Action(kind, stage, mb) for kind in ("F", "B") for mb in range(microbatches)]
    )


def one_f_one_b(stages: int, microbatches: int) -> Schedule:
    """Warm-up forwards, then one forward and one backward in turn, then the remaining backwards (Narayanan et al. 2021)."""

    def actions(stage: int) -> list[Action]:
        warmup = min(stages - stage - 1, microbatches)
        order = [Action("F", stage, mb) for mb in range(warmup)]
        for mb in range(microbatches - warmup):
            order += [Action("F", stage, warmup + mb), Action("B", stage, mb)]
        return order + [Action("B", stage, mb) for mb in range(microbatches - warmup, microbatches)]

    return _one_stage_a_rank(stages, microbatches, actions)


def forward_only(stages: int, microbatches: int) -> Schedule:
    """Forwards alone: evaluation."""
    return _one_stage_a_rank(stages, microbatches, lambda stage: [Action("F", stage, mb) for mb in range(microbatches)])


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"1f1b": one_f_one_b, "gpipe": gpipe}
