"""Measures when a rank does what in a step. Made by `pipeline/runtime.py` for a step that is traced.

All ranks share one clock: the wall clock of their hosts, minus the moment at which the last rank arrived at the step. It is
exact on one host; between hosts it is as good as their time synchronization.

On a GPU the host runs ahead of the device, so moments are marked by CUDA events in the stream and turned into seconds after
the step, by their distance to an event whose host time is known because the device was idle when it was recorded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist

from megatron_llm.parallel.collectives import all_reduce
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.actions import Action, Kind
from megatron_llm.pipeline.timeline import Event

EventKind = Kind | Literal["send"]
Mark = float | torch.cuda.Event


class Recorder:
    """Collects the spans of one step of this rank. Making one is collective over the grid."""

    def __init__(self, grid: Grid, device: torch.device):
        self.rank, self.device = grid.pp.rank, device
        self._spans: list[tuple[EventKind, Action, Mark, Mark]] = []
        arrival = torch.tensor(time.time(), dtype=torch.float64, device=device)
        self._origin = all_reduce(arrival, grid.world, dist.ReduceOp.MAX).item()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._base, self._base_seconds = self._mark(), time.time() - self._origin

    @contextmanager
    def span(self, kind: EventKind, action: Action) -> Iterator[None]:
        """Measure what happens inside."""
        start = self._mark()
        yield
        self._spans.append((kind, action, start, self._mark()))

    def events(self) -> list[Event]:
        """What was measured, in order. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [
            Event(self.rank, kind, action.stage, action.microbatch, self._seconds(start), self._seconds(end))
            for kind, action, start, end in self._spans
        ]

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.time()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float):
            return mark - self._origin
        assert isinstance(self._base, torch.cuda.Event)
        return self._base_seconds + self._base.elapsed_time(mark) / 1000
