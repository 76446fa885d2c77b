"""Ranks and devices: from the launcher's environment to a process group. Called by `training/loop.py`.

The only environment variables read in the project are the launcher's: those of `launcher.py`, and TORCHELASTIC_* of a torchrun
that restarts ranks.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_llm.training.agreement import AgreedError
from megatron_llm.training.launcher import Launch, launch_of, under_torchrun
from megatron_llm.training.limits import at_most, end_process
from megatron_llm.training.roll_call import STORE_GRACE_SECONDS, STORE_LOST, roll_call
from megatron_llm.training.roster import roster_of
from megatron_llm.training.signals import EXIT_STOPPED


def launched_world_size() -> int:
    """How many ranks the launcher started; 1 without a launcher."""
    return launch_of().world_size


def launched_rank() -> int:
    """This process's rank; 0 without a launcher."""
    return launch_of().rank


def may_restart() -> bool:
    """Whether torchrun starts ranks anew that fail."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def exit_code_of_stopped_run() -> int:
    """75, or 0 under `torchrun --max-restarts`, which would start ranks anew that end with anything else.

    Each node's agent counts its restarts by itself, so whether some are left does not matter: all ranks must say the same.
    """
    return 0 if may_restart() else EXIT_STOPPED


def launched_at() -> float:
    """When the run was launched on this node, on the clock of `time.monotonic`: the start of torchrun, or of this process.

    A rank that torchrun has restarted has not got more time than the one before.
    """
    processes = [os.getpid()]
    if under_torchrun():
        processes.append(os.getppid())
    return time.monotonic() - max(map(_age, processes))


def _age(process: int) -> float:
    """Seconds since a process was started; 0 where the system does not say."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22, since the machine was started
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError):
        return 0.0


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """This rank's device: the GPU with the number of its local rank, or the CPU.

    SLURM may show each task of srun its own GPU alone (`--gpus-per-task`, `--gpu-bind`): that has the number 0 everywhere.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    launch, visible = launch_of(), torch.cuda.device_count()
    local = 0 if launch.slurm and visible == 1 else launch.local_rank
    if local >= visible:
        bound = ", or give each task its own (srun --gpus-per-task=1 or --gpu-bind=none)" if launch.slurm else ""
        raise ValueError(f"local rank {local} has no GPU: {visible} visible; start fewer ranks per node{bound}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def process_group(
    device: torch.device, timeout_seconds: float, report: Callable[[str], object] = lambda reason: None
) -> Iterator[None]:
    """The default process group for the duration of a run: NCCL on GPUs, gloo on CPUs; none for a single process.

    report: called with the reason before the process is ended because it has lost the others.
    """
    if launched_world_size() == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = 3 * timeout_seconds + STORE_GRACE_SECONDS  # three meetings of all ranks, none of which may take longer by itself
    late = f"the ranks did not meet within {limit:g} s: {STORE_LOST}"
    try:
        with at_most(limit, lambda: end_process(launched_rank(), late, report)):
            _join(backend, timedelta(seconds=timeout_seconds))
        with roll_call(timeout_seconds, report):
            yield
            dist.barrier()  # torchrun ends all ranks when one exits with 75, and rank 0 may still have something to write
    except AgreedError:
        raise
    except ValueError as error:
        error.add_note(f"on rank {launched_rank()}")  # not every rank may have failed: this one must be heard
        raise
    # Not after a failure: NCCL would first wait for messages that no longer come. The process ends, and the group with it.
    dist.destroy_process_group()
    # In cycles of objects groups live on, and gloo's threads with them: one that lets go of a tensor while the interpreter ends
    # needs Python's lock, and aborts the process when it does not get it.
    gc.collect()


def _join(backend: str, timeout: timedelta) -> None:
    """Make the default process group.

    Its store may be that of torchrun's agents and survive the ranks; see `roster.py`.
    """
    launch = launch_of()
    if launch.slurm:
        store, rank, world = _store_of_step(launch, timeout), launch.rank, launch.world_size
    else:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(roster_of(store, rank, world, timeout), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _store_of_step(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store of the tasks of a step of srun, which rank 0 holds. Raises ValueError if they do not find each other.

    Another step's that has the same port is not taken for it: keys begin with the name of the step.
    """
    host, port = launch.head
    try:
        store = dist.TCPStore(host, port, launch.world_size, launch.rank == 0, timeout, wait_for_workers=False)
    except dist.DistError as error:
        where = f"rank {launch.rank} of {launch.world_size} (step {launch.slurm} of SLURM)"
        if launch.rank == 0:
            raise ValueError(f"{where} cannot listen at port {port}: set MASTER_PORT to a free one ({error})") from error
        raise ValueError(
            f"{where} did not reach rank 0 at {host}:{port} within {timeout.total_seconds():g} s: it has ended, and says why, or "
            f"set MASTER_ADDR to an address of its host that all nodes reach ({error})"
        ) from error
    return dist.PrefixStore(f"step {launch.slurm}", store)
