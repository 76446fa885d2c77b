"""Being asked to stop, by a signal or by the clock. Called by `training/loop.py`.

A first SIGTERM, SIGINT or SIGUSR1 (SLURM's warning before a time limit) lets the step finish and a checkpoint be saved;
one rank receiving it is enough, because the flag travels with the loss. A second one ends the process at once. So does
`training.max_minutes`, which asks like a first signal.

Python runs signal handlers between two instructions of the main thread, and a rank that waits in a collective executes none.
So signals are counted by a thread of its own, which wakes when one arrives: a run that hangs can be ended too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from megatron_llm.training.launcher import launch_of

EXIT_STOPPED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_REQUEST_SECONDS = 3.0  # launchers and batch systems may all pass on one request, and be late on a busy machine


def time_limit(max_minutes: float | None, launched_at: float) -> tuple[float | None, str]:
    """`deadline` and `limit` of a `StopRequest`, for a run that was launched then (`time.monotonic()`)."""
    if max_minutes is None:
        return None, ""
    return launched_at + 60 * max_minutes, f"training.max_minutes: {max_minutes:g} are over"


class StopRequest:
    """Context manager: `requested` turns true when a signal arrives or the time is over. In the main thread only.

    A signal within three seconds of the one before is taken for the same request. SIGTERM or SIGINT after SIGUSR1 is a first
    signal, since SLURM sends SIGTERM at the limit that it warned of.

    Args:
        deadline: `time.monotonic()` at which to stop; None for never.
        limit: what to call the deadline.
        at_once: called with a sentence before a second signal ends the process with exit code 128 + its number.
    """

    def __init__(self, deadline: float | None = None, limit: str = "", at_once: Callable[[str], object] | None = None) -> None:
        self._deadline, self._limit, self._at_once = deadline, limit, at_once
        self._first: signal.Signals | None = None
        self._latest: tuple[signal.Signals, float] | None = None
        self._previous: dict[int, Any] = {}
        self._pipe = (-1, -1)
        self._previous_pipe = -1
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)

    @property
    def requested(self) -> bool:
        """Whether this rank is to stop."""
        return self._first is not None or self._late()

    @property
    def reason(self) -> str:
        """Why a run has stopped, as far as this rank knows."""
        if self._first is not None:
            return f"signal {self._first.name}"
        return self._limit if self._late() else "another rank was asked to stop"

    def __enter__(self) -> StopRequest:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, lambda *_: None)  # the thread does the rest
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # SLURM warns each node by itself: a rank may hear of it when it has saved and is about to end with its exit code.
            late = number == signal.SIGUSR1 and launch_of().world_size > 1
            signal.signal(number, signal.SIG_IGN if late else handler)
        signal.set_wakeup_fd(self._previous_pipe)
        os.close(self._pipe[1])  # the thread reads to the end
        self._thread.join()
        os.close(self._pipe[0])

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _listen(self) -> None:
        while arrived := os.read(self._pipe[0], 1):
            if arrived[0] in _SIGNALS:
                self._on_signal(signal.Signals(arrived[0]))

    def _on_signal(self, number: signal.Signals) -> None:
        now, latest = time.monotonic(), self._latest
        self._first = self._first or number
        if latest is not None and now - latest[1] < _SAME_REQUEST_SECONDS:
            return
        self._latest = number, now
        if latest is None or (latest[0] == signal.SIGUSR1 != number):
            return
        text = f"ended at once by a second signal ({number.name})"
        print(text, file=sys.stderr, flush=True)
        if self._at_once:
            # The folder may be what hangs.
            last_words = threading.Thread(target=self._at_once, args=(text,), daemon=True)
            last_words.start()
            last_words.join(4.0)  # the launch scripts kill after five
        os._exit(128 + number)
