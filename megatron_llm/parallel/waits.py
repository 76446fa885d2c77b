"""How long a rank stands still for others. Marked where exchanges are waited for (`collectives.py`, `pipeline/messages.py`).

All ranks end a step together, so their seconds tell nothing of who is slow; what a rank takes besides its waits does
(`training/stragglers.py`). It is measured in few steps only; in all others a wait costs one look at a flag.

On a GPU the host goes on and the stream waits, so events of the stream mark when it began to and when it went on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """This moment: of the host, or on a GPU of its current stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Of two marks of one device, which must have come to the second one."""
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    return float(start.elapsed_time(end)) / 1000


class Waits:
    """Of one rank. All axes of its grid share one.

    Attributes:
        spans: the waits so far while they are measured; None otherwise.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[Mark, Mark]] | None = None

    def wait(self, wait: Callable[[], object], device: torch.device) -> None:
        """Call `wait`, and mark how long it takes if that is measured."""
        if self.spans is None:
            wait()
            return
        start = mark(device)
        wait()
        self.spans.append((start, mark(device)))

    @contextmanager
    def measured(self, device: torch.device, into: list[float]) -> Iterator[None]:
        """Add to `into` the seconds of what is done inside, without its waits. On a GPU the stream is waited for in the end."""
        spans: list[tuple[Mark, Mark]] = []
        self.spans = spans
        start = mark(device)
        try:
            yield
            end = mark(device)
        finally:
            self.spans = None
        if isinstance(end, torch.cuda.Event):
            end.synchronize()
        into.append(seconds_between(start, end) - sum(seconds_between(*span) for span in spans))
