"""Which of how many ranks a process is, as its launcher says: torchrun, SLURM's `srun`, or none.

Called by `training/distributed.py`, and where commands ask before they load torch. With `distributed.py` the only place that
reads the launcher's environment:

    torchrun, and those who do as it does   RANK, WORLD_SIZE, LOCAL_RANK; MASTER_ADDR and MASTER_PORT, read by torch
    torchrun                                TORCHELASTIC_RUN_ID
    srun                                    SLURM_JOB_ID, _STEP_ID, _PROCID, _NTASKS, _LOCALID, the nodes of the step

torchrun's count where both are there: SLURM has then started torchrun. The shells of `sbatch` and `salloc` have variables of
SLURM too, for all tasks of the job, but what is started in them without `srun` is one process. So is what is typed into the shell
of `srun --pty bash`. mpirun is refused.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # and above: SLURM's numbers of the shells of sbatch and salloc, where they have one
_SPEECH_SECONDS = 4.0  # that rank 0 gets, which may have begun later, to say something
_PORTS = range(20000, 32000)  # below those that Linux gives to connections


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together.

    Attributes:
        rank: from 0, below `world_size`.
        local_rank: the same among the processes of this node.
        slurm: the step of the job (`123.0`) if srun is the launcher; "" if not.
        head: with `slurm`, host and port where ranks meet.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    slurm: str = ""
    head: tuple[str, int] = ("", 0)


def launch_of(environment: Mapping[str, str] | None = None) -> Launch:
    """What the environment (default: this process's) says. Raises ValueError if it says it by halves, or what cannot be."""
    given = os.environ if environment is None else environment
    if "RANK" in given or "WORLD_SIZE" in given:
        way_out = "unset both for a single process, or use torchrun"
        numbers = _numbers(given, "RANK", "WORLD_SIZE", who="the launcher", way_out=way_out)
        return Launch(*_checked("RANK", "WORLD_SIZE", *numbers), _number(given, "LOCAL_RANK", "0"))
    _refuse_mpirun(given)
    return _of_srun(given) if _in_step(given) else Launch()


def under_torchrun() -> bool:
    """Whether torchrun itself started this process, and ends it with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def leave_after_rank_0() -> None:
    """Call where rank 0 says for all why they end with an error: torchrun ends it as soon as it sees another that has."""
    if under_torchrun() and launch_of().rank > 0:
        time.sleep(_SPEECH_SECONDS)


def _in_step(given: Mapping[str, str]) -> bool:
    """Whether srun has started this process, rather than a shell that has SLURM's variables."""
    if "SLURM_PTY_PORT" in given and os.isatty(0) and _parent() != "slurmstepd":
        return False  # typed into the shell of `srun --pty bash`: its other tasks ended at once, having no terminal
    if "SLURM_STEP_ID" in given:
        return _number(given, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP
    return "SLURM_PROCID" in given and _number(given, "SLURM_PROCID") > 0  # the shell of sbatch is 0


def _parent() -> str:
    """The name of the program that started this process; "" where the system does not say."""
    try:
        return Path(f"/proc/{os.getppid()}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _refuse_mpirun(given: Mapping[str, str]) -> None:
    """Its processes would each take themselves for the only one, or within SLURM for the daemon of Open MPI that started them."""
    hydra = given.get("PMI_SIZE") if "MPI_LOCALRANKID" in given else None  # srun sets PMI_SIZE, too
    size = given.get("OMPI_COMM_WORLD_SIZE") or hydra or "1"
    if size != "1":
        raise ValueError(
            f"mpirun started this process as one of {size}, but ranks are told by torchrun or srun: use one of them, or have "
            "each process set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )


def _of_srun(given: Mapping[str, str]) -> Launch:
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in given else "SLURM_NTASKS"
    names = ("SLURM_PROCID", count, "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    way_out = "pass all variables SLURM_* on (into a container, too), or set RANK and WORLD_SIZE"
    rank, world_size, local_rank, job, step = _numbers(given, *names, who="srun", way_out=way_out)
    _checked("SLURM_PROCID", count, rank, world_size)
    if world_size == 1:
        return Launch(slurm=f"{job}.{step}")
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST", "")
    host = given.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise ValueError("srun started this process, but SLURM_STEP_NODELIST is missing; set MASTER_ADDR to the host of rank 0")
    port = _number(given, "MASTER_PORT") if given.get("MASTER_PORT") else port_of(job, step)
    return Launch(rank, world_size, local_rank, f"{job}.{step}", (host, port))


def port_of(job: int, step: int = 0) -> int:
    """A port for a step of a job: others for the steps of a job, and for jobs that share a node, as far as numbers can tell."""
    return _PORTS[(16 * job + step) % len(_PORTS)]


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: `n007` of `n[007-012,20],login`."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _numbers(given: Mapping[str, str], *names: str, who: str, way_out: str) -> list[int]:
    missing = [name for name in names if not given.get(name)]
    if missing:
        there = " and ".join(f"{name}={given[name]}" for name in names if given.get(name))
        raise ValueError(f"{who} set {there}, but not {' and '.join(missing)}: {way_out}")
    return [_number(given, name) for name in names]


def _number(given: Mapping[str, str], name: str, default: str = "") -> int:
    text = given.get(name, default)
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"the launcher's variable {name} is {text!r}, which is no number from 0")
    return int(text)


def _checked(rank_name: str, count_name: str, rank: int, count: int) -> tuple[int, int]:
    if rank >= count:
        raise ValueError(f"the launcher set {rank_name}={rank}, which is not below {count_name}={count}: ranks count from 0")
    return rank, count
