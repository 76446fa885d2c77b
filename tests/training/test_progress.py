"""What long work says of itself, on a clock that the test moves."""

from __future__ import annotations

import time

import pytest

from megatron_llm.training import progress as module
from megatron_llm.training.progress import Progress


def test_it_says_the_part_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    alive: list[None] = []
    progress = Progress("reading", lambda: alive.append(None))
    said: list[str] = []
    monkeypatch.setattr(module.logger, "info", lambda text, *values: said.append(text % values))
    for clock[0], part in (
        (101.0, 0.1),
        (120.0, 0.25),
        (121.0, 0.5),
        (160.0, 0.75),
        (200.0, 0.1),
        (209.0, 0.2),
        (220.0, 0.5),
        (300.0, 0.0),
        (400.0, 0.0),
        (420.0, 0.5),  # at first nobody knows how far it is
    ):
        progress(part)
    assert said == [
        "reading: 25 %, 60 s left",
        "reading: 75 %, 20 s left",
        "reading: 50 %, 20 s left",  # another piece of work, which began at 200
        "reading: 50 %, 20 s left",
    ]
    assert len(alive) == 10
