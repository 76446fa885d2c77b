"""When what happened, or would happen: the data that the simulator and the runtime's trace share.

Made by `pipeline/simulate.py` (computed) and `pipeline/runtime.py` (measured); drawn and written by the commands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal


@dataclass(frozen=True, slots=True)
class Event:
    """Something that takes time. `start` and `end` in seconds, on a clock common to all ranks.

    An action (F, B, W) occupies its rank. A "send" is a message on its way to this rank, for an action on (stage,
    microbatch), and occupies nobody; in a measured timeline it is the part of the way that the rank waited for.
    """

    rank: int
    kind: Literal["F", "B", "W", "send"]
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The events of all ranks of one step.

    placement: the pipeline rank of every stage.
    """

    placement: tuple[int, ...]
    events: tuple[Event, ...]

    @property
    def ranks(self) -> int:
        return max(self.placement) + 1

    @cached_property
    def _extents(self) -> list[tuple[float, float, float]]:
        """(first start, last end, sum of durations) of the actions of every rank."""
        work: list[list[Event]] = [[] for _ in range(self.ranks)]
        for event in self.events:
            if event.kind != "send":
                work[event.rank].append(event)
        return [
            (
                min((e.start for e in events), default=0.0),
                max((e.end for e in events), default=0.0),
                sum(e.end - e.start for e in events),
            )
            for events in work
        ]

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end of an action, over all ranks."""
        return max(end for _, end, _ in self._extents) - min(start for start, _, _ in self._extents)

    def span(self, rank: int) -> float:
        """Seconds from the first start to the last end of an action of a rank."""
        start, end, _ = self._extents[rank]
        return end - start

    def busy(self, rank: int) -> float:
        """Seconds that a rank spends in actions."""
        return self._extents[rank][2]

    @property
    def bubble_of_span(self) -> float:
        """Idle over busy time of the worst rank, from its own first action to its own last: what the papers count."""
        return max((self.span(rank) / self.busy(rank) - 1 for rank in range(self.ranks) if self.busy(rank)), default=0.0)

    @property
    def bubble_of_makespan(self) -> float:
        """Idle over busy time of the busiest rank if all start and end together, as gradient clipping makes them."""
        busiest = max(self.busy(rank) for rank in range(self.ranks))
        return self.makespan / busiest - 1 if busiest else 0.0
