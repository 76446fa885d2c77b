"""Ranks that a command starts itself: processes of this machine. Called by `training/verify.py` and `training/inference.py`.

Training has torchrun for this. A command that needs several ranks for a moment should not have to be started under it, and can
watch its ranks better than they each other: the first error of any is the error of the command, and none outlives it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_llm.training.distributed import pick_device, process_group
from megatron_llm.training.roll_call import is_loss

_START_SECONDS = 60.0  # that a process may take until its own limit begins: it imports torch, on a busy machine
_GRACE_SECONDS = 10.0  # for the rank that failed to say so, when others have said that they lost it
_FAILED, _WATCHDOG = 3, 1  # exit codes: an error, which has been reported; the limit of faulthandler


@dataclass(frozen=True)
class _Failure:
    """Why a rank failed. lost: it is another that failed; mistake: the user's."""

    text: str
    lost: bool = False
    mistake: bool = False


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, timeout_seconds: float, device: Literal["auto", "cpu", "cuda"] = "cpu"
) -> Any:
    """What `fn(*args)` returns on rank 0 of `world` new processes that share a process group; none has one if it is alone.

    `fn` is a function of a module. It, its arguments and its result travel by pickle: numpy arrays rather than tensors, which
    torch would put into shared memory. device: of the process group, as in `pick_device`.

    Raises a rank's ValueError as it was, RuntimeError with the traceback of any other error of a rank, or saying how one died,
    and ValueError if all of it takes longer than `timeout_seconds`, with the stacks of the ranks on stderr.
    """
    # Held here and not by rank 0: the port is one that is free, and the store outlives every rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher = {
        "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
        "GLOO_SOCKET_IFNAME": "lo",  # the machine's host name need not resolve
    }  # fmt: skip
    job, threads = pickle.dumps((fn, args)), max(1, torch.get_num_threads() // world)
    context = multiprocessing.get_context("spawn")
    ranks: dict[Connection, SpawnProcess] = {}
    try:
        for rank in range(world):
            ours, theirs = context.Pipe()
            environment = launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(
                target=_be_rank, args=(theirs, environment, threads, job, timeout_seconds, device), daemon=True
            )
            process.start()
            theirs.close()  # so that the end of the process is the end of the connection
            ranks[ours] = process
        return _result(ranks, timeout_seconds)
    finally:
        for connection, process in ranks.items():
            process.kill()
            process.join()
            connection.close()


def _result(ranks: dict[Connection, SpawnProcess], timeout_seconds: float) -> Any:
    """Wait until every rank is done, or one has failed."""
    numbers = {connection: number for number, connection in enumerate(ranks)}
    deadline = time.monotonic() + timeout_seconds + _START_SECONDS  # the ranks' own limit comes first, and shows where they are
    result, failure = None, None
    while numbers:
        ready = multiprocessing.connection.wait(list(numbers), max(0.0, deadline - time.monotonic()))
        if not ready and failure is None:
            raise _too_long(timeout_seconds)
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            number = numbers.pop(connection)
            said = _said(connection, number, ranks[connection], timeout_seconds)
            if not isinstance(said, _Failure):
                result = said if number == 0 else result
            elif not said.lost:
                raise (ValueError if said.mistake else RuntimeError)(said.text)
            elif failure is None:
                failure, deadline = said, min(deadline, time.monotonic() + _GRACE_SECONDS)
    if failure is not None:
        raise RuntimeError(failure.text)
    return result


def _said(connection: Connection, number: int, process: SpawnProcess, timeout_seconds: float) -> Any:
    """A rank's result or _Failure."""
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        pass
    process.join()
    code = process.exitcode or 0
    if code == _WATCHDOG:
        raise _too_long(timeout_seconds)
    how = f"was killed by {signal.Signals(-code).name}; is there enough memory?" if code < 0 else f"ended with exit code {code}"
    return _Failure(f"rank {number} {how}")


def _too_long(timeout_seconds: float) -> ValueError:
    return ValueError(f"the ranks took longer than {timeout_seconds:g} s; give them more time with --timeout")


def _be_rank(
    connection: Connection,
    environment: dict[str, str],
    threads: int,
    job: bytes,
    timeout_seconds: float,
    device: Literal["auto", "cpu", "cuda"],
) -> NoReturn:
    """The life of a rank's process."""
    faulthandler.dump_traceback_later(timeout_seconds, exit=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command, which kills its ranks
    os.environ.update(environment)
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own, for processes that share a terminal, would be reported as leaked
    code = _FAILED
    try:
        with _reporting(connection):
            fn, args = pickle.loads(job)
            with process_group(pick_device(device), timeout_seconds), _reporting(connection):
                result = fn(*args)
            connection.send_bytes(pickle.dumps(result if environment["RANK"] == "0" else None))
        code = 0
    except Exception:
        pass  # it has been reported
    finally:
        os._exit(code)


@contextmanager
def _reporting(connection: Connection) -> Any:
    """Tell the command of an error at once: leaving the process group after one takes its time."""
    try:
        yield
    except Exception as error:
        if not connection.closed:
            connection.send_bytes(pickle.dumps(_failure(error)))
            connection.close()
        raise


def _failure(error: Exception) -> _Failure:
    if isinstance(error, ValueError):
        return _Failure("\n".join([str(error), *getattr(error, "__notes__", [])]), mistake=True)
    return _Failure(f"rank {os.environ['RANK']} failed:\n{traceback.format_exc().rstrip()}", lost=is_loss(error))
