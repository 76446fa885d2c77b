"""Long work of all ranks, each in a thread of its own: writing, committing, reading a checkpoint to compare checksums.

Ranks take different times for it, and none may sit in a collective until the last is done: a collective has a time limit, and the
disk of one rank may need longer. So they tell each other again and again how far they are. Used by `saver.py` and
`training/recovery.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.objects import all_gather_objects

_LOOK_SECONDS = 1.0


class Work:
    """What `work` does in a thread, from now on.

    work: gets a function that it calls with the number of bytes that it has dealt with, and with 0 when something else has
        gone on. That raises RuntimeError after `abandon`.
    size: bytes that there are to deal with; 0 if nobody knows.
    """

    def __init__(self, work: Callable[[Callable[[int], None]], Any], size: int = 0):
        self._future: Future[Any] = Future()
        self._headway, self._size = 0, size
        self._abandoned = False
        # It does not keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Callable[[int], None]], Any]) -> None:
        try:
            self._future.set_result(work(self._progress))
        except BaseException as error:
            self._future.set_exception(error)

    def _progress(self, count: int) -> None:
        self._headway += max(1, count)
        if self._abandoned:
            raise RuntimeError("the run has ended")

    @property
    def done(self) -> bool:
        return self._future.done()

    def result(self) -> Any:
        """What the work came to, when it is done. Raises what it raised."""
        self._thread.join()  # it lets go of what it wrote, which must not be when the interpreter ends
        return self._future.result()

    def abandon(self) -> None:
        """Let the work end soon."""
        self._abandoned = True

    def wait_for_all(self, world: Axis, progress: Callable[[float], object]) -> None:
        """Return when the work of all ranks is done. Collective.

        progress: called whenever that of some rank has gone on, with the part that all have done; 0 if nobody knows.
        """
        before: list[tuple[bool, int, int]] = []
        while True:
            wait([self._future], timeout=_LOOK_SECONDS)
            now = all_gather_objects((self.done, self._headway, self._size), world)
            if all(done for done, _, _ in now):
                return
            if now != before:
                sizes = sum(size for _, _, size in now)
                progress(min(1.0, sum(headway for _, headway, size in now if size) / sizes) if sizes else 0.0)
            before = now
