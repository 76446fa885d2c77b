"""Runs a command on several ranks as a launcher would: real processes that may be killed, and what became of each.

`tests.ranks.run_ranks` makes a process group and expects every rank to live. Here each rank is a process of its own that
finds the launcher's environment, makes its own process group, and may end in any way: that is the result. The processes are
forked from the same template as those of `run_ranks`, so a start costs a tenth of a second instead of five. Each has a parent
that does nothing but wait for it, and kill it if asked to.

As under a launcher, ranks do not outlive one that was killed by much; all others must end by themselves.
"""

from __future__ import annotations

import faulthandler
import math
import multiprocessing.connection
import os
import pickle
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.ports import free_port
from tests.ranks import MAX_RANKS, RankFailure, _Worker, fork_worker

GRACE_SECONDS = 1.0  # that ranks live on after one was killed
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    Attributes:
        code: its exit code, or minus the signal that killed it, as in `subprocess`.
        log: everything that it wrote.
        seconds: how long it lived.
        put_down: it was killed because another rank had been.
    """

    code: int
    log: str
    seconds: float
    put_down: bool = False


def launch(
    world: int,
    fn: Callable[..., Any],
    *args: Any,
    kill_after: dict[int, float] | None = None,
    grace: float = GRACE_SECONDS,
    timeout: float = 300,
) -> list[Ending]:
    """Run `fn(*args)` in `world` new processes with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.

    Args:
        fn: a module-level function. The int that it returns is the exit code, 0 without one; an exception is code 1 and its
            traceback is in the log, as in any Python program.
        kill_after: seconds after which a rank gets SIGKILL, by rank.
        grace: seconds that the others get after a rank died by a signal.
        timeout: seconds that a rank may take.

    Raises RankFailure with the stacks if a rank takes longer.
    """
    if not 1 <= world <= MAX_RANKS:
        raise ValueError(f"world {world} is not in 1..{MAX_RANKS}")
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    workers: list[_Worker] = []
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        try:
            for rank in range(world):
                workers.append(fork_worker())
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                place, call = Path(folder) / str(rank), pickle.dumps((fn, args))
                arguments = (call, environment, place, (kill_after or {}).get(rank), timeout)
                workers[-1].start(rank, 1, folder, timeout + 20, pickle.dumps((_supervise, arguments, {})))
            return _endings(workers, Path(folder), grace, timeout)
        finally:
            for rank, worker in enumerate(workers):
                if not worker.connection.closed:  # no answer: something went wrong here
                    _kill_job(Path(folder) / str(rank))
                    worker.kill()  # others end by themselves, and their numbers may be another process's by now


def _endings(workers: list[_Worker], folder: Path, grace: float, timeout: float) -> list[Ending]:
    """Wait for all ranks; those that live on too long after one was killed are killed."""
    endings: dict[int, Ending] = {}
    put_down: set[int] = set()
    waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
    deadline = time.monotonic() + timeout + 25
    limit = math.inf  # when the others are put down
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, min(limit, deadline) - time.monotonic()))
        for connection in ready:
            assert isinstance(connection, multiprocessing.connection.Connection)
            rank = waiting.pop(connection)
            ok, answer = pickle.loads(connection.recv_bytes())
            connection.close()
            assert ok, answer
            code, seconds = answer
            log = (folder / f"{rank}.log").read_text(errors="replace")
            endings[rank] = Ending(code, log, seconds, rank in put_down and code == KILLED)
            if code < 0:
                limit = min(limit, time.monotonic() + grace)
        now = time.monotonic()
        if now >= deadline and waiting:
            raise RankFailure(f"ranks {sorted(waiting.values())} did not end, and could not be ended")
        if now >= limit:
            put_down |= {rank for rank in waiting.values() if rank not in put_down and _kill_job(folder / str(rank))}
            limit = math.inf if put_down.issuperset(waiting.values()) else now + 0.05  # some have not begun
    late = [rank for rank, ending in endings.items() if ending.seconds >= timeout]
    if late:
        raise RankFailure(
            "\n".join(f"--- rank {rank} took longer than {timeout:g} s:\n{endings[rank].log[-6000:]}" for rank in late)
        )
    return [endings[rank] for rank in range(len(workers))]


def _kill_job(place: Path) -> bool:
    """Whether there was a process to kill: the rank may not have begun, or may have ended."""
    try:
        os.kill(int(place.with_suffix(".pid").read_text()), signal.SIGKILL)
    except (OSError, ValueError):
        return False
    return True


def _supervise(
    call: bytes, environment: dict[str, str], place: Path, kill_after: float | None, timeout: float
) -> tuple[int, float]:
    """Run the rank as a child of this worker: its exit code as in `Ending`, and the seconds that it lived."""
    faulthandler.cancel_dump_traceback_later()  # its thread does not come along, and the child would wait for it
    log = os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # here: the rank may be killed before it can
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be_rank(call, environment, log, timeout)
    os.close(log)
    place.with_suffix(".pid").write_text(str(pid))
    handle = os.pidfd_open(pid)
    ended, _, _ = select.select([handle], [], [], timeout + 5 if kill_after is None else kill_after)
    os.close(handle)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    place.with_suffix(".pid").unlink()  # before the number can be another process's
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start


def _be_rank(call: bytes, environment: dict[str, str], log: int, timeout: float) -> NoReturn:
    """Call the function in this process, and end it as the interpreter would."""
    code = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
        faulthandler.dump_traceback_later(timeout, exit=True, file=sys.stderr)
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the template ignores it
        fn, args = pickle.loads(call)
        code = fn(*args) or 0
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
