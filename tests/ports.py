"""A port that stays free until whoever is given it listens there."""

from __future__ import annotations

import random
import socket

_choose = random.SystemRandom()  # tests run in several processes, and some seed `random`


def free_port() -> int:
    """A free port of 127.0.0.1, below those of SLURM's jobs (from 20000) and those that Linux gives to whoever asks for any."""
    while True:
        port = _choose.randrange(10_000, 20_000)
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one whose connections have just ended will do
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
