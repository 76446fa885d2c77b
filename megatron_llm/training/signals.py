"""Being asked to stop. Called by `training/loop.py`.

A first SIGTERM, SIGINT or SIGUSR1 (SLURM's warning before a time limit) lets the step finish and a checkpoint be saved;
one rank receiving it is enough, because the flag travels with the loss. A second one acts at once, as without a handler.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

EXIT_STOPPED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Context manager: `requested` turns true when a signal arrives. Works in the main thread only."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._previous[number])
