"""A port that stays free until whoever is given it listens there."""

from __future__ import annotations

import os
import random
import socket

_choose = random.SystemRandom()  # some tests seed `random`
_given: set[int] = set()  # it takes a while until somebody listens there


def free_port() -> int:
    """A free port of 127.0.0.1, below those of SLURM's jobs (from 20000) and those that Linux gives to whoever asks for any."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = _choose.randrange(10_000 + number, 20_000, processes)  # of those that are this process's
        if port in _given:
            continue
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one whose connections have just ended will do
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
