"""The harness of commands on several ranks: how each ended is told, none outlives a killed one by much, nothing is left."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.launch import KILLED, launch
from tests.ranks import RankFailure, run_ranks


def _sum_in_an_own_group() -> int:
    assert not dist.is_initialized() and torch.get_num_threads() == 1
    dist.init_process_group("gloo")
    total = torch.tensor([float(os.environ["LOCAL_RANK"]) + 1])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total)


def _end_in_many_ways() -> int | None:
    rank = int(os.environ["RANK"])
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} here")
    if rank == 1:
        raise KeyError("planted")
    if rank == 2:
        sys.exit(5)
    if rank == 3:
        threading.Thread(target=lambda: (time.sleep(0.3), print("a thread ends"))).start()
    return 75 if rank == 4 else None


def _sleep(seconds: float) -> None:
    print("going to sleep")
    time.sleep(seconds)


def _kill_rank(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2 if int(os.environ["RANK"]) == 0 else 1000)


def _environment() -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("MASTER_PORT")


def test_ranks_make_their_own_group() -> None:
    assert [ending.code for ending in launch(3, _sum_in_an_own_group)] == [6, 6, 6]


def test_every_way_to_end_is_told() -> None:
    endings = launch(5, _end_in_many_ways)
    assert [ending.code for ending in endings] == [0, 1, 5, 0, 75]
    assert all(f"rank {rank} of 5 here\n" in ending.log for rank, ending in enumerate(endings))
    assert "in _end_in_many_ways" in endings[1].log and "KeyError: 'planted'" in endings[1].log
    assert endings[3].log.endswith("a thread ends\n"), "as at the end of any program"


def test_ranks_are_killed_at_their_time_and_the_others_soon_after() -> None:
    start = time.monotonic()
    endings = launch(3, _sleep, 1000.0, kill_after={1: 6.0}, grace=6.0)
    assert time.monotonic() - start < 40
    assert [(ending.code, ending.put_down) for ending in endings] == [(KILLED, True), (KILLED, False), (KILLED, True)]
    assert endings[1].seconds >= 6.0 and endings[0].seconds - endings[1].seconds > 2.0 and endings[1].log == "going to sleep\n"


def test_a_rank_that_is_killed_before_it_has_begun_ends_as_any_other() -> None:
    for _ in range(20):
        endings = launch(2, _sleep, 1000.0, kill_after={0: 0.0}, grace=0.0)
        assert [(ending.code, ending.put_down) for ending in endings] == [(KILLED, False), (KILLED, True)]
        assert all(ending.log in ("", "going to sleep\n") for ending in endings)


def test_who_ends_by_itself_in_time_is_not_put_down() -> None:
    endings = launch(3, _kill_rank, 1, grace=15.0)
    assert [(ending.code, ending.put_down) for ending in endings] == [(0, False), (KILLED, False), (KILLED, True)]


def test_a_rank_that_hangs_is_a_failure_with_its_stack() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 0 took longer than 8 s(.|\n)*going to sleep(.|\n)*in _sleep"):
        launch(2, _sleep, 1000.0, timeout=8)
    assert time.monotonic() - start < 40


def test_nothing_of_it_stays() -> None:
    """Not its processes, and not its environment in those of `run_ranks`, which come from the same template."""
    environments, processes = run_ranks(2, _environment), _descendants(os.getpid())
    launch(2, _sleep, 1000.0, kill_after={0: 0.1}, grace=0.1)
    launch(1, _sleep, 0.0)
    assert run_ranks(2, _environment) == environments and environments[0][1] is None
    deadline = time.monotonic() + 30
    while (left := _descendants(os.getpid()) - processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left and len(processes) >= 3, "a template and two workers"


def _descendants(pid: int) -> set[int]:
    """Processes that come from `pid`, other than those that are only waiting to be asked how they ended."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, parent = file.read().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(name)] = int(parent)
    found, size = {pid}, 0
    while size != len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}
