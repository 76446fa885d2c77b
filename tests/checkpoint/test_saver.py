"""Saving behind the steps: what is saved is the moment of the copy, nobody waits, all ranks learn of every outcome together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_llm.checkpoint import (
    Contents,
    SaveError,
    Saver,
    TensorToSave,
    latest_checkpoint,
    open_checkpoint,
    save_checkpoint,
    saver,
)
from megatron_llm.checkpoint.saver import Staging
from megatron_llm.ops.storage import Folder, open_folder
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part
from tests.ranks import run_ranks


def _world() -> Axis:
    if not dist.is_initialized():
        return Axis("world")
    rank, size = dist.get_rank(), dist.get_world_size()
    return Axis("world", rank, size, tuple(range(size)), dist.group.WORLD)


class Run:
    """A run that only saves: a vector of which each rank holds four elements, all of them the step."""

    def __init__(self, checkpoints: Path, asynchronous: bool = True):
        self.world, self.checkpoints = _world(), checkpoints
        self.values = torch.zeros(4)
        self.committed: list[str] = []
        self.alive = 0
        self.saver = Saver(self.world, asynchronous, lambda folder: self.committed.append(folder.name), self._live)

    def _live(self, _: float) -> None:
        self.alive += 1

    def save(self, step: int, wait: bool = False) -> None:
        self.values.fill_(step)
        size, rank = self.world.size, self.world.rank
        item = TensorToSave("weights", "x", (4 * size,), Box((4 * rank,), (4,)), self.values)
        folder = open_folder(self.checkpoints).child(f"step-{step:08d}")
        self.saver.start(folder, [item], Contents({"step": step}, {}), wait)

    def step(self) -> bool:
        """What a training step does for a save; whether the ranks went on to its next stage."""
        ready = torch.tensor(float(self.saver.ready))
        if self.world.size > 1:
            dist.all_reduce(ready)
        if int(ready) == self.world.size:
            self.saver.advance()
        return int(ready) == self.world.size

    def until_committed(self) -> int:
        """Steps that it took."""
        for count in range(1, 100_000):
            time.sleep(0.001)
            self.step()
            if not self.saver.busy:
                return count
        raise AssertionError("never committed")

    def stored(self) -> tuple[int, list[float]] | None:
        found = latest_checkpoint(self.checkpoints)
        if found is None:
            return None
        shape = found.tensors("weights")["x"].shape
        return found.step, found.source("weights").read(Part("x", shape, ()), Box.full(shape)).tolist()


def _slow_writes(gate: Path, ranks: tuple[int, ...]) -> Any:
    """`write_rank_file` that waits on some ranks until `gate` exists."""
    plain = saver.write_rank_file

    def write(folder: Folder, rank: int, *args: Any) -> Any:
        deadline = time.monotonic() + 120
        while rank in ranks and not gate.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return plain(folder, rank, *args)

    return write


@contextlib.contextmanager
def patched(name: str, value: Any, owner: Any = saver) -> Iterator[None]:
    """Workers are used again: what is replaced there must come back."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def train_while_writing(folder: Path) -> None:
    """Three steps happen while the write of rank 1 is stuck; what they change is not in the checkpoint."""
    run, gate = Run(folder / "c"), folder / "gate"
    with patched("write_rank_file", _slow_writes(gate, (1,))):
        run.save(7)
        for step in (8, 9, 10):
            run.values.fill_(step)
            assert not run.step(), "a rank has not written yet"
            assert run.stored() is None
        if run.world.rank == 0:
            deadline = time.monotonic() + 60
            while not run.saver.ready:
                assert time.monotonic() < deadline, "rank 0 waits for rank 1"
                time.sleep(0.01)
            gate.touch()
        else:
            assert not run.saver.ready
        run.until_committed()
    assert run.stored() == (7, [7.0] * 8)
    assert len(run.committed) == (run.world.rank == 0)
    assert run.saver.stall_seconds() > 0 and run.saver.stall_seconds() == 0


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    run_ranks(2, train_while_writing, tmp_path)


def save_twice(folder: Path) -> None:
    run, gate = Run(folder / "c"), folder / "gate"
    with patched("write_rank_file", _slow_writes(gate, (0, 1))):
        run.save(1)
        assert run.stored() is None
        dist.barrier()
        if run.world.rank == 0:
            gate.touch()
        run.save(2)  # first waits for the other
    assert run.stored() == (1, [1.0] * 8)
    run.saver.finish()
    assert run.stored() == (2, [2.0] * 8)
    run.saver.finish()


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    run_ranks(2, save_twice, tmp_path)


def fail_in_the_background(folder: Path, how: str) -> str:
    """The error of one rank's thread, as this rank hears of it; and the older checkpoint is still the newest."""
    run = Run(folder / "c")
    run.save(1, wait=True)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    here = run.world.rank == (0 if how == "commit" else 1)
    owner, name = {"write": (saver, "write_rank_file"), "commit": (saver, "commit"), "copy": (Staging, "copy")}[how]
    with patched(name, fail if here else getattr(owner, name), owner):
        run.save(2)
        with pytest.raises(SaveError) as error:
            run.until_committed()
    assert run.stored() == (1, [1.0] * 8)
    return str(error.value)


@pytest.mark.parametrize(("how", "rank"), [("write", 1), ("commit", 0), ("copy", 1)])
def test_an_error_in_the_background_is_raised_on_all_ranks(tmp_path: Path, how: str, rank: int) -> None:
    said = run_ranks(2, fail_in_the_background, tmp_path, how)
    assert said[0] == said[1]
    assert f"step-00000002 was not written: rank {rank}: OSError: [Errno 28] No space left on device" in said[0]


def wait_for_a_slow_rank(folder: Path) -> int:
    """Rank 1 writes until it has heard three times that the work goes on: never, if rank 0 sits in one collective until then."""
    run = Run(folder / "c")
    plain = saver.write_rank_file

    def slow(folder: Folder, rank: int, tensors: Any, progress: Any) -> Any:
        deadline = time.monotonic() + 60
        while rank == 1 and run.alive < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
            progress(1)
        return plain(folder, rank, tensors, progress)

    with patched("write_rank_file", slow):
        run.save(1, wait=True)
    assert run.stored() == (1, [1.0] * 8)
    return run.alive


def test_a_slow_rank_is_waited_for_and_seen_to_be_alive(tmp_path: Path) -> None:
    assert all(alive >= 3 for alive in run_ranks(2, wait_for_a_slow_rank, tmp_path))


@pytest.mark.parametrize(("asynchronous", "wait"), [(True, True), (False, False)])
def test_what_does_not_go_on_is_not_copied(tmp_path: Path, asynchronous: bool, wait: bool) -> None:
    run = Run(tmp_path, asynchronous)
    run.saver._staging.copy = lambda _: pytest.fail("copied")  # type: ignore[method-assign]
    run.save(3, wait)
    assert run.stored() == (3, [3.0] * 4) and run.committed == ["step-00000003"]


def test_an_abandoned_save_ends_soon_and_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)

    def write(folder: Folder, rank: int, tensors: Any, progress: Any) -> Any:
        while True:
            time.sleep(0.01)
            progress(1)

    monkeypatch.setattr(saver, "write_rank_file", write)
    run.save(1)
    run.saver.abandon()
    assert run.saver._work is not None
    assert isinstance(run.saver._work._future.exception(60), RuntimeError)
    assert run.stored() is None


def test_the_copy_is_kept_for_the_next_save_and_holds_any_tensor(tmp_path: Path) -> None:
    staging = Staging()
    base = torch.arange(24.0).reshape(4, 6)
    tensors = [base[1:3, 1:5], base.t().bfloat16(), torch.tensor(2.5, dtype=torch.float64), torch.zeros(0, 3)]

    def items() -> list[TensorToSave]:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        return [
            TensorToSave("m", str(n), shape, Box.full(shape), tensor)
            for n, (shape, tensor) in enumerate(zip(shapes, tensors, strict=True))
        ]

    copies = staging.copy(items())
    expected = [tensor.clone() for tensor in tensors]
    base.zero_()
    for copy, value in zip(copies, expected, strict=True):
        assert copy.tensor.dtype is value.dtype and torch.equal(copy.tensor, value)
    buffer = staging._buffer
    assert buffer.numel() <= sum(tensor.nbytes for tensor in tensors) + 64 * len(tensors), "one copy, and no more"
    staging.copy(items())
    assert staging._buffer is buffer
    assert torch.equal(copies[0].tensor, torch.zeros(2, 4)), "until the next call"


def test_tensors_may_be_made_when_their_turn_comes(tmp_path: Path) -> None:
    alive: list[int] = []

    def load(n: int) -> torch.Tensor:
        alive.append(n)
        return torch.full((2,), float(n))

    empty = torch.empty(2, device="meta")
    items = [TensorToSave("weights", str(n), (2,), Box((0,), (2,)), empty, lambda n=n: load(n)) for n in range(3)]  # type: ignore[misc]
    save_checkpoint(tmp_path / "step-00000000", items, Contents({"step": 0}, {}), Axis("world"))
    assert alive == [0, 1, 2]
    source = open_checkpoint(tmp_path / "step-00000000").source("weights")
    assert source.read(Part("2", (2,), ()), Box((0,), (2,))).tolist() == [2.0, 2.0]
