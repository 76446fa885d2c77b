"""Time limits on what cannot be interrupted. Used by `hang_watch.py`, `roll_call.py` and `distributed.py`."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

FILE_SECONDS = 10.0  # to write why a process ends, as a file system may be what hangs, or hang with the network


def within(seconds: float, action: Callable[[], object]) -> bool:
    """Whether an action that may hang or fail was done in time. It goes on in a thread that ends with the process."""
    done = threading.Event()

    def act() -> None:
        try:
            action()
        except (OSError, RuntimeError):  # a full disk, a store that has gone
            return
        done.set()

    threading.Thread(target=act, daemon=True).start()
    return done.wait(seconds)


class Standstill:
    """How long something has stood still, for a thread that looks every `tick` seconds.

    Time in which that thread did not run either, as the process was stopped and continued, does not count.
    """

    def __init__(self, tick: float, mark: float):
        """mark: whatever changes when something goes on, such as when it last did."""
        self._seconds = 0.0
        self._tick, self._mark, self._looked = tick, mark, time.monotonic()

    def look(self, mark: float) -> float:
        """Seconds since the mark changed."""
        now = time.monotonic()
        self._seconds = self._seconds + min(now - self._looked, 5 * self._tick) if mark == self._mark else 0.0
        self._mark, self._looked = mark, now
        return self._seconds


@contextmanager
def at_most(seconds: float, late: Callable[[], object]) -> Iterator[None]:
    """Call `late` in another thread when the body takes longer."""
    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_process(rank: int, reason: str, report: Callable[[str], object]) -> NoReturn:
    """End this process from any thread with exit code 1: say why on stderr, and to `report`."""
    print(f"rank {rank}: {reason}", file=sys.stderr, flush=True)
    within(FILE_SECONDS, lambda: report(reason))
    os._exit(1)
