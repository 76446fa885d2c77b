"""Long work that is no step says how far it is: loading, evaluations, saves that are waited for. Called by `training/loop.py`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger("megatron_llm")
_SECONDS = 10.0  # between two lines; what is done earlier says nothing


class Progress:
    """Called with the part of a piece of work that is done, as often as one likes; 0 if nobody knows.

    A part that is less than the one before begins another piece. Ranks above 0 are silent by their log level.
    """

    def __init__(self, what: str, alive: Callable[[], object] = lambda: None):
        """alive: called each time."""
        self.what, self.alive = what, alive
        self._started = self._said = time.monotonic()
        self._part = 0.0

    def __call__(self, part: float) -> None:
        self.alive()
        now = time.monotonic()
        if part < self._part or not part:
            self._started = self._said = now
        self._part = part
        if now - self._said < _SECONDS or part <= 0:
            return
        self._said = now
        left = (now - self._started) * (1 / part - 1)
        logger.info("%s: %.0f %%, %.0f s left", self.what, 100 * part, left)
