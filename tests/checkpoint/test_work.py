"""Long work of all ranks: none waits in a collective for longer than a moment, and errors and ends are seen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from megatron_llm.checkpoint.work import Work
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.objects import all_gather_objects, gather_objects_to_first
from tests.ranks import run_ranks


def _world() -> Axis:
    rank, size = dist.get_rank(), dist.get_world_size()
    return Axis("world", rank, size, tuple(range(size)), dist.group.WORLD)


def outlast_collectives() -> tuple[str, int, list[int], list[int]]:
    """Rank 1 works until it has heard three times that the work goes on: never, if rank 0 sits in one collective until then."""
    world = _world()
    alive = 0

    def work(progress: Callable[[int], None]) -> str:
        deadline = time.monotonic() + 60
        while world.rank == 1 and alive < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
            progress(10)
        return f"of rank {world.rank}"

    def count(_: float) -> None:
        nonlocal alive
        alive += 1

    mine = Work(work)
    mine.wait_for_all(world, count)
    return mine.result(), alive, all_gather_objects(world.rank, world), gather_objects_to_first(world.rank, world)


def test_idle_ranks_hear_that_another_goes_on() -> None:
    zero, one = run_ranks(2, outlast_collectives)
    assert (zero[0], one[0]) == ("of rank 0", "of rank 1")
    assert zero[1] >= 3 and one[1] >= 3, "the watch of every rank is told"
    assert zero[2:] == ([0, 1], [0, 1]) and one[2:] == ([0, 1], [])


def test_work_that_stands_still_is_not_alive() -> None:
    alive: list[int] = []

    def work(_: Callable[[int], None]) -> None:
        time.sleep(3.5)

    Work(work).wait_for_all(Axis("world"), lambda _: alive.append(1))
    assert len(alive) <= 1, "the first look alone is news"


def test_the_part_is_that_of_all_ranks() -> None:
    parts: list[float] = []
    shares = [0.25, 0.5, 0.75, 1.0]

    def work(progress: Callable[[int], None]) -> None:
        deadline = time.monotonic() + 60
        for share in shares:
            progress(25)
            while share not in parts and time.monotonic() < deadline:
                time.sleep(0.01)

    Work(work, 100).wait_for_all(Axis("world"), parts.append)
    assert parts in (shares, [0.0, *shares]), "the first look may come before the work has begun"


def test_errors_are_kept_and_abandoned_work_ends() -> None:
    def fail(_: Callable[[int], None]) -> None:
        raise OSError(5, "planted")

    failed = Work(fail)
    failed.wait_for_all(Axis("world"), lambda _: None)
    with pytest.raises(OSError, match="planted"):
        failed.result()

    def forever(progress: Callable[[int], None]) -> None:
        while True:
            time.sleep(0.01)
            progress(0)

    abandoned = Work(forever)
    abandoned.abandon()
    abandoned.wait_for_all(Axis("world"), lambda _: None)
    with pytest.raises(RuntimeError, match="the run has ended"):
        abandoned.result()


class _GoesSlowly:
    def __del__(self) -> None:
        time.sleep(0.5)


def test_its_thread_has_ended_when_it_has_a_result() -> None:
    """What a thread lets go of in C++ while the interpreter ends would abort a process whose run is done."""

    let_go = threading.Event()

    def begin() -> Work:
        held = _GoesSlowly()
        return Work(lambda _: let_go.wait(60) and bool(held))

    before = set(threading.enumerate())
    work = begin()
    let_go.set()
    assert work.result()
    assert set(threading.enumerate()) <= before
