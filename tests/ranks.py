"""Runs a function on several gloo ranks: what every test of more than one process is built on.

A spawned rank costs seconds (it imports torch again) and tests need hundreds of them. So one *template* process is forked
from pytest when collection ends (torch and the test modules are imported, no test has started a thread yet), workers are
forked from the template in milliseconds when first needed, and each serves one job after another. Forking from the
template rather than from pytest keeps workers clean of the threads that earlier tests left behind.

Nothing hangs: a watchdog thread in each worker dumps every Python stack and exits when a job is over its limit, and the parent
waits only a little longer than that. After any failure all workers are killed and the next job gets new ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import multiprocessing.connection
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

MAX_RANKS = 8
GRACE_SECONDS = 2.0  # after the first failure, for the other ranks to say what happened to them


class RankFailure(Exception):
    """One or more ranks of a job failed; the message holds their tracebacks, the first to fail first."""


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, connection: Connection):
        self.connection = connection
        if not connection.poll(120):
            raise RuntimeError("a worker process did not start within 120 s")
        self.pid: int = pickle.loads(connection.recv_bytes())

    def start(self, rank: int, world: int, folder: str, timeout: float, call: bytes) -> None:
        """Give it a job; its answer comes over the connection."""
        self.connection.send_bytes(pickle.dumps((rank, world, folder, timeout, call)))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(self.pid, signal.SIGKILL)
        self.connection.close()


class _Pool:
    """The template's control socket and the workers that are idle or at work."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        self.control, template_end = socket.socketpair()
        torch.set_num_threads(1)  # before the fork: an OpenMP pool does not survive it
        gc.collect()
        gc.freeze()  # what is imported need not be looked at after each job
        if os.fork() == 0:
            self.control.close()
            _never_return(_serve_forks, template_end)
        template_end.close()

    def take(self, count: int) -> list[_Worker]:
        """`count` workers, forking those that are missing."""
        while len(self.workers) < count:
            self.workers.append(self.fork())
        return self.workers[:count]

    def fork(self) -> _Worker:
        """A new worker, which is the caller's to end."""
        ours, theirs = socket.socketpair()
        socket.send_fds(self.control, [b"f"], [theirs.fileno()])
        theirs.close()
        return _Worker(Connection(ours.detach()))

    def kill(self) -> None:
        while self.workers:
            self.workers.pop().kill()


_pool: _Pool | None = None


def start_template() -> None:
    """Fork the template process now, if there is none. `conftest.py` calls this when collection has ended."""
    global _pool
    if _pool is None:
        _pool = _Pool()


def fork_worker() -> _Worker:
    """A worker that has had no job yet, and that no other job gets. The caller kills it in the end; `tests/launch.py` does."""
    start_template()
    assert _pool is not None
    return _pool.fork()


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 240, **kwargs: Any) -> list[Any]:
    """The results of `fn(*args, **kwargs)` on ranks 0 .. world - 1, in rank order.

    `fn` is a module-level function; arguments and results travel by pickle. Inside, `torch.distributed` is initialized
    with a gloo world of its own (not for world 1), torch uses one thread and is seeded with 0. `timeout` is in seconds.

    Raises RankFailure with the tracebacks if a rank raises, dies or is over the limit.
    """
    if not 1 <= world <= MAX_RANKS:
        raise ValueError(f"world {world} is not in 1..{MAX_RANKS}")
    start_template()
    assert _pool is not None
    done = False
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            workers = _pool.take(world)
            for rank, worker in enumerate(workers):
                worker.start(rank, world, folder, timeout, pickle.dumps((fn, args, kwargs)))
            results = _collect(workers, Path(folder), timeout)
            done = True
            return results
        finally:
            if not done:
                _pool.kill()


def _collect(workers: list[_Worker], folder: Path, timeout: float) -> list[Any]:
    """Wait for every worker's answer; raise RankFailure as soon as it is clear that one failed."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout + 5.0  # the workers' own watchdogs act first and tell where they were
    waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for connection in multiprocessing.connection.wait(list(waiting), left):
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                ok, payload = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                stacks = folder / f"stacks-{rank}"
                ok, payload = False, (stacks.read_text() if stacks.exists() else "") or "the process died without a traceback"
            if ok:
                results[rank] = payload
            else:
                if not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                failures[rank] = payload
    for rank in waiting.values():
        failures[rank] = "still at work when the job was ended"
    if failures:
        world = len(workers)
        raise RankFailure("\n".join(f"--- rank {rank} of {world}:\n{text.rstrip()}" for rank, text in failures.items()))
    return [results[rank] for rank in range(len(workers))]


def _never_return(serve: Callable[[socket.socket], None], end: socket.socket) -> NoReturn:
    """Run the loop of a forked process and exit without pytest's or torch's exit handlers."""
    try:
        serve(end)
    except (EOFError, OSError):
        pass  # pytest is gone
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _serve_forks(control: socket.socket) -> None:
    """The template: fork one worker for every socket that arrives, until pytest closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's to handle
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead workers leave no zombies
    for name in ("init_process_group", "new_group"):
        setattr(dist, name, _then_let_gloo_yield(getattr(dist, name)))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        end = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _never_return(_serve_jobs, end)
        end.close()


def _then_let_gloo_yield(make_group: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes a process group, after which gloo's loop threads have the lowest priority.

    Such a thread asks without a pause for a lock that another thread of its process holds. Where there are fewer cores than ranks
    it keeps that thread from running: all-reduces of 4 ranks on 2 cores take half as long again, or twice as long.
    """

    @functools.wraps(make_group)
    def make(*args: Any, **kwargs: Any) -> Any:
        group = make_group(*args, **kwargs)
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                if (task / "comm").read_text() == "gloo_tcp_loop\n":
                    os.setpriority(os.PRIO_PROCESS, int(task.name), 19)
        return group

    return make


def _serve_jobs(end: socket.socket) -> None:
    """A worker: run jobs until pytest closes its end, or until one fails."""
    connection = Connection(end.detach())
    connection.send_bytes(pickle.dumps(os.getpid()))
    while True:
        rank, world, folder, timeout, call = pickle.loads(connection.recv_bytes())
        with open(Path(folder) / f"stacks-{rank}", "w") as stacks:
            faulthandler.dump_traceback_later(timeout, exit=True, file=stacks)
            try:
                result = _run_job(rank, world, folder, timeout, call)
                answer = pickle.dumps((True, result))
            except BaseException:  # pytest's outcomes (skip, fail) and SystemExit must reach the test too
                connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
                return  # exiting closes the gloo sockets, so that ranks that wait for this one fail at once
            finally:
                faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(answer)


def _run_job(rank: int, world: int, folder: str, timeout: float, call: bytes) -> Any:
    """Run one pickled call in a process group of its own."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    fn, args, kwargs = pickle.loads(call)
    if world == 1:
        return fn(*args, **kwargs)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's host name need not resolve
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    result = fn(*args, **kwargs)
    gc.collect()  # groups in cycles of objects would live on in some ranks, and their threads wake for ever when others have gone
    dist.barrier()  # nobody closes its sockets while another rank may still read from them
    dist.destroy_process_group()
    return result
