"""How many bytes a rank exchanges. Counted where exchanges begin (`collectives.py`, `pipeline/messages.py`), kept on the axis
that they go over (`Axis.traffic`), reported per step by `training/loop.py`. What a step needs: `docs/performance.md`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Exchange = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "message"]


@dataclass(frozen=True)
class Traffic:
    """What one rank has exchanged over one axis. Counts only grow: what a step adds is a difference of two copies.

    Attributes:
        ranks: size of the axis.
        payload: bytes of the whole tensors by kind: of what is reduced, of what is gathered from all ranks or scattered to
            them, of what a rank has for all, of a message at its sender.
    """

    ranks: int
    payload: Counter[Exchange] = field(default_factory=Counter)

    def add(self, kind: Exchange, whole: Tensor) -> None:
        """Count one exchange of `whole`, which knows its size without asking a device."""
        self.payload[kind] += whole.nbytes

    def copy(self) -> Traffic:
        return Traffic(self.ranks, self.payload.copy())

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.ranks, self.payload - earlier.payload)

    @property
    def sent(self) -> float:
        """Bytes that the rank sends where collectives go round a ring, on average the least that ranks can send.

        (n - 1) / n of the tensor for a reduce-scatter, an all-gather or an all-to-all, twice that for an all-reduce, which is one
        after the other (Patarasuk and Yuan 2009), and a message once. Networks whose switches add need less, which is not
        subtracted.
        """
        ring, payload = (self.ranks - 1) / self.ranks, self.payload
        once = payload["reduce_scatter"] + payload["all_gather"] + payload["all_to_all"] + 2 * payload["all_reduce"]
        return ring * once + payload["message"]
