"""What a schedule consists of: actions, and lists of them per rank. Imported by everything in `pipeline/`.

Letters of the whole package: p ranks, m micro-batches, v model chunks a rank, p * v stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["F", "B", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "W")  # in the order of their dependencies; a schedule has the first one, two or three


class Action(NamedTuple):
    """One micro-batch through one stage: forward (F), backward (B), or weight gradients (W) where B leaves them out.

    A named tuple, because large schedules have hundreds of thousands of them in sets and dictionaries.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}(stage {self.stage}, micro-batch {self.microbatch})"

    def consumer(self, stages: int) -> Action | None:
        """The action on a neighbouring stage, of `stages`, that needs the result of this one; None if none does."""
        target = self.stage + (1 if self.kind == "F" else -1)
        return Action(self.kind, target, self.microbatch) if self.kind != "W" and 0 <= target < stages else None


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

    @cached_property
    def numbers(self) -> list[np.ndarray]:
        """For every rank its actions as places in a list of all F, all B and all W by stage."""
        stages = len(self.placement)
        return [
            np.fromiter((KINDS.index(kind) * stages + stage for kind, stage, _ in actions), dtype=np.int64, count=len(actions))
            for actions in self.actions
        ]

    @cached_property
    def channels(self) -> dict[tuple[int, int], list[Action]]:
        """The messages of every channel (sender, receiver), as the actions that consume them, in the order of sending.

        What is handed to another stage of the same rank is no message. Proof and runtime both go by this.
        """
        order: dict[tuple[int, int], list[Action]] = {}
        for rank, actions in enumerate(self.actions):
            for action in actions:
                target = action.consumer(len(self.placement))
                if target is not None and (receiver := self.placement[target.stage]) != rank:
                    order.setdefault((rank, receiver), []).append(target)
        return order
