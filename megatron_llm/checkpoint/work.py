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
    """

    def __init__(self, work: Callable[[Callable[[int], None]], Any]):
        self._future: Future[Any] = Future()
        self._headway = 0
        self._abandoned = False
        # It does not keep the process from ending.
        threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True).start()

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
        return self._future.result()

    def abandon(self) -> None:
        """Let the work end soon."""
        self._abandoned = True

    def wait_for_all(self, world: Axis, alive: Callable[[], object]) -> None:
        """Return when the work of all ranks is done. Collective. alive: called whenever that of some rank has gone on."""
        before: list[tuple[bool, int]] = []
        while True:
            wait([self._future], timeout=_LOOK_SECONDS)
            now = all_gather_objects((self.done, self._headway), world)
            if all(done for done, _ in now):
                return
            if now != before:
                alive()
            before = now
