"""What a schedule consists of: actions, and lists of them per rank. Imported by everything in `pipeline/`.

Letters of the whole package: p ranks, m micro-batches, v model chunks a rank, p * v stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W"]


class Action(NamedTuple):
    """One micro-batch through one stage: forward (F), backward (B), or weight gradients (W) where B leaves them out.

    A named tuple, because large schedules have hundreds of thousands of them in sets and dictionaries.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}(stage {self.stage}, micro-batch {self.microbatch})"


@dataclass(frozen=True)
class Schedule:
    """Attributes:
    placement: the pipeline rank of every stage, in the order of the model.
    microbatches: how many go through every stage.
    actions: for every rank, what it does in order.
    """

    placement: tuple[int, ...]
    microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    @cached_property
    def split(self) -> bool:
        """Whether weight gradients are actions of their own: B computes input gradients only, W the weight gradients."""
        return any(action.kind == "W" for actions in self.actions for action in actions)
