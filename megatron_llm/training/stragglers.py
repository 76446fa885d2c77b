"""Finds ranks that are slower than those that do the same work. Called by `training/loop.py`.

All ranks end a step together, since each waits for the slowest. What tells is the time that a rank takes besides its waits for
others (`parallel/waits.py`): its busy seconds, measured in the last `MEASURED_STEPS` steps of every `logging.straggler_every` and
exchanged once. A rank is compared with its peers: those of its pipeline rank, who hold the same layers.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_llm.config import LoggingConfig
from megatron_llm.parallel.collectives import all_gather
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.objects import all_gather_objects

logger = logging.getLogger("megatron_llm")

MEASURED_STEPS = 3  # whose median is taken, so that a hiccup of one step accuses nobody
_NOISE_SECONDS = 0.005  # a step; ranks that differ by less are not worth a warning
_NAMED = 4


@dataclass(frozen=True)
class Compared:
    """A rank and its peers. factor: its busy seconds over `median`, that of its peers without itself."""

    rank: int
    seconds: float
    median: float
    peers: int

    @property
    def factor(self) -> float:
        return self.seconds / self.median if self.median else 1.0


def compare(seconds: Sequence[float], pipeline_ranks: int) -> list[Compared]:
    """Every rank that has peers, by the busy seconds of all ranks, the slowest against its peers first. Pure.

    Ranks of one pipeline rank follow each other (`parallel/grid.py`).
    """
    size, found = len(seconds) // pipeline_ranks, []
    for start in range(0, len(seconds), size) if size > 1 else ():
        order = sorted(range(start, start + size), key=lambda rank: seconds[rank])
        others, middle = size - 1, (size - 1) // 2
        for place, rank in enumerate(order):
            # The sorted list without this one: those behind it move up.
            upper, lower = (seconds[order[at + (at >= place)]] for at in (middle, middle - 1 + others % 2))
            found.append(Compared(rank, seconds[rank], (upper + lower) / 2, others))
    return sorted(found, key=lambda one: -one.factor)


class Stragglers:
    """Measures this rank and compares all."""

    def __init__(self, grid: Grid, device: torch.device, settings: LoggingConfig):
        self._grid, self._device = grid, device
        self._every, self._factor = settings.straggler_every if grid.world.size > 1 else 0, settings.straggler_factor
        self._seconds: list[float] = []
        self._hosts: list[str] = []

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around a step: measure it if it is one of those."""
        if not self._every or -step % self._every >= MEASURED_STEPS:
            yield
            return
        with self._grid.world.waits.measured(self._device, self._seconds):
            yield

    def look(self, step: int) -> dict[str, float]:
        """Metrics of the ranks' busy seconds after a step that is due, and a warning of those that are slow. Collective."""
        if not self._every or step % self._every or not self._seconds:
            return {}
        world, mine = self._grid.world, statistics.median(self._seconds)
        self._seconds = []
        self._hosts = self._hosts or all_gather_objects(os.uname().nodename, world)
        seconds = all_gather(torch.tensor([mine], dtype=torch.float32, device=self._device), world).tolist()
        compared = compare(seconds, self._grid.pp.size)
        slow = [one for one in compared if one.factor >= self._factor and one.seconds - one.median >= _NOISE_SECONDS]
        if slow and world.first:
            logger.warning("step %d | %s", step, self._say(slow))
        values = {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
        worst = {"slowest_rank": compared[0].rank, "slowest_factor": compared[0].factor} if compared else {}
        return {f"busy_seconds/{name}": value for name, value in values.items()} | worst

    def _say(self, slow: Sequence[Compared]) -> str:
        named = [
            f"rank {one.rank} on {self._hosts[one.rank]} was busy for {one.seconds:.3g} s a step, {one.factor:.2f} times the "
            f"median {one.median:.3g} s of "
            + (f"its {one.peers} peers" if one.peers > 1 else "its only peer")
            + (f" of pipeline rank {one.rank * self._grid.pp.size // len(self._hosts)}" if self._grid.pp.size > 1 else "")
            for one in slow[:_NAMED]
        ]
        more = f"; and {len(slow) - _NAMED} more" if len(slow) > _NAMED else ""
        return f"slow, and all others wait: {'; '.join(named)}{more} (logging.straggler_factor {self._factor:g})"
