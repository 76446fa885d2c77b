"""Ranks find those they begin with, in a store where earlier ones have left their traces, whatever the order they come in."""

from __future__ import annotations

import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_llm.training import roster
from megatron_llm.training.roster import roster_of

LIMIT = timedelta(seconds=20)


def meet(store: dist.Store, world: int, delays: list[float]) -> list[str]:
    """The name that each rank of a new world finds when it comes some time later."""

    def rank(number: int) -> str:
        time.sleep(delays[number])
        return roster_of(store.clone(), number, world, LIMIT)

    with ThreadPoolExecutor(world) as pool:
        found: list[Future[str]] = [pool.submit(rank, number) for number in range(world)]
        return [future.result() for future in found]


@pytest.mark.parametrize("seed", range(4))
def test_each_start_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(roster, "_ROSTER_SECONDS", 0.2)
    monkeypatch.setattr(roster, "_LOOK_SECONDS", 0.01)
    store, order = dist.HashStore(), random.Random(seed)
    names = []
    for world in (3, 3, 2, 4, 3):  # nodes come and go
        found = meet(store, world, [order.choice((0.0, 0.05, 0.5)) for _ in range(world)])
        assert len(set(found)) == 1, "all of one start have the same"
        names.append(found[0])
    assert len(set(names)) == len(names)


def test_a_process_that_left_its_id_and_died_is_not_waited_for_as_if_it_lived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "_ROSTER_SECONDS", 0.2)
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match="rank 1: not all of 2 ranks were there within 0.3 s"):
        roster_of(store.clone(), 1, 2, timedelta(seconds=0.3))
    assert len(set(meet(store, 2, [0.0, 1.0]))) == 1
