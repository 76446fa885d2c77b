"""Claims: a rank saves and loads at 0.9 of the speed of torch.save and torch.load or faster, holding one copy of its share while
it saves and next to nothing while it loads; and training stands still for the copy alone, however slow the storage is.

Speed and memory: each of --ranks processes, of one thread on one core, holds --megabytes of float32 in tensors as an optimizer
has them (weights, m and v of layers, of which each rank holds some rows). In a round it

    save           as a run does, in the background, until the manifest is there; with the copy
    save_at_once   the same without the copy, as at the end of a run
    load           opens, compares every checksum, fills the tensors that are there

    torch_save     torch.save of the same tensors, and fsync
    torch_load     torch.load, and a copy into the tensors

Ours writes, syncs and names files durably, makes and stores checksums and a manifest; the peer's fsync brings its file to the
disk as well. Ours and the peer take turns, in an order that swaps; the figure is the median of the rounds' ratios of the slowest
rank. Files are read from the page cache. Memory is what a rank holds at most beyond what it held before (VmHWM).

Stall: two data-parallel ranks train a decoder of 9 million parameters and save every --every steps into a folder that takes
--throttle bytes a second and rank, so that a save outlasts several steps: once in the background, once at once. Told are seconds
of a step, and those that training stood still for a save, also in steps. The claim is that in the background this is less than
5 % of a step for every step of a run that saves every 100 steps.

    python benchmarks/checkpoint.py [--megabytes 1000] [--rounds 5] [--folder DIR]

Exits 1 if a claim does not hold.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from common import Ranks, finish, machine, parser
from fsspec.implementations.local import LocalFileSystem

from megatron_llm.checkpoint import Contents, Saver, TensorToSave, open_checkpoint
from megatron_llm.config import parse_config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.ops.storage import open_folder
from megatron_llm.parallel.grid import Axis, Grid
from megatron_llm.parallel.shard import Box, Part, fill
from megatron_llm.training.build import build_engine
from megatron_llm.training.recovery import make_pruner, start_save
from megatron_llm.training.step import RunState, train_step

LEAST, MOST_STALL, MEBIBYTE = 0.9, 0.05, 2**20
COLUMNS, KINDS = 2048, ("weights", "m", "v")


class Throttled(LocalFileSystem):
    """Local files, written at `rate` bytes a second."""

    protocol = "throttled"
    rate = 1e6

    def _open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        file = super()._open(path, mode, **how)
        if "w" in mode:
            plain = file.write
            file.write = lambda data: (time.sleep(len(data) / self.rate), plain(data))[1]
        return file


fsspec.register_implementation("throttled", Throttled, clobber=True)


def world() -> Axis:
    rank, size = dist.get_rank(), dist.get_world_size()
    return Axis("world", rank, size, tuple(range(size)), dist.group.WORLD)


def memory(field: str) -> float:
    """MiB that this process holds (VmRSS), or has held at most since `forget_peak` (VmHWM)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def state(megabytes: float, axis: Axis) -> list[TensorToSave]:
    """A rank's share of weights and moments: its rows of matrices of 32 MB."""
    count = max(1, round(megabytes / len(KINDS) / 32))
    rows = 32 * 10**6 // (4 * COLUMNS)
    items = []
    for kind in KINDS:
        for layer in range(count):
            box = Box((rows * axis.rank, 0), (rows, COLUMNS))
            items.append(TensorToSave(kind, f"layers.{layer}.w", (rows * axis.size, COLUMNS), box, torch.randn(rows, COLUMNS)))
    return items


def speed_rank(folder: str, megabytes: float) -> Callable[[str], dict[str, float]]:
    """On a rank: what does one part of a round, and says how long it took and how much memory."""
    axis, place = world(), open_folder(folder).child("step-00000000")
    items = state(megabytes, axis)
    size = sum(item.tensor.nbytes for item in items)
    peer = Path(folder) / f"peer-{axis.rank}.pt"
    savers = {how: Saver(axis, how == "save", lambda _: None) for how in ("save", "save_at_once")}

    def save(how: str) -> None:
        savers[how].start(place, items, Contents({"step": 0}, {}))
        savers[how].finish()

    def load() -> None:
        checkpoint = open_checkpoint(place)
        problems = checkpoint.damaged(axis.rank, axis.size)
        assert not problems
        for item in items:
            for _ in fill(item.tensor, Part(item.name, item.shape, ()), item.box, checkpoint.source(item.kind)):
                pass

    def torch_save() -> None:
        torch.save({f"{item.kind}/{item.name}": item.tensor for item in items}, peer)
        descriptor = os.open(peer, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def torch_load() -> None:
        found = torch.load(peer)
        for item in items:
            item.tensor.copy_(found[f"{item.kind}/{item.name}"])

    work: dict[str, Callable[[], None]] = {
        "save": lambda: save("save"),
        "save_at_once": lambda: save("save_at_once"),
        "load": load,
        "torch_save": torch_save,
        "torch_load": torch_load,
    }

    def answer(what: str) -> dict[str, float]:
        dist.barrier()
        forget_peak()
        before, start = memory("VmRSS"), time.perf_counter()
        work[what]()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "extra_mib": memory("VmHWM") - before, "bytes": size}

    return answer


def measure_speed(folder: Path, ranks: int, megabytes: float, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {}
    extra: dict[str, list[float]] = {}
    with Ranks(ranks, speed_rank, str(folder), megabytes) as call:
        for number in range(rounds + 1):
            order = ["save", "torch_save", "save_at_once", "load", "torch_load"]
            for what in order if number % 2 else [order[1], order[0], order[2], order[4], order[3]]:
                answers = call(what)
                if number:  # the first round warms up, and makes the copy's memory
                    times.setdefault(what, []).append(max(answer["seconds"] for answer in answers))
                extra.setdefault(what, []).append(max(answer["extra_mib"] for answer in answers))
    size = answers[0]["bytes"]

    def ratio(ours: str, peer: str) -> dict[str, Any]:
        ratios = [theirs / mine for mine, theirs in zip(times[ours], times[peer], strict=True)]
        return {
            "gb_per_second_and_rank": round(size / statistics.median(times[ours]) / 1e9, 3),
            "peer": round(size / statistics.median(times[peer]) / 1e9, 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(value, 2) for value in sorted(ratios)],
        }

    return {
        "bytes_per_rank": size,
        "save": ratio("save", "torch_save"),
        "save_at_once": ratio("save_at_once", "torch_save"),
        "load": ratio("load", "torch_load"),
        "extra_mib_at_most": {what: round(max(values), 1) for what, values in extra.items()},
        "share_mib": round(size / MEBIBYTE, 1),
    }


def stall_rank(folder: str, asynchronous: bool, throttle: float, every: int) -> Callable[[int], dict[str, Any]]:
    """On a rank: what trains so many steps, saving now and then."""
    Throttled.rate = throttle
    place = f"throttled://{folder}/stall" if throttle else f"{folder}/stall"
    config = parse_config(
        {
            "model": {
                "vocab_size": 2048, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4,
                "num_attention_heads": 6,
            },
            "data": {"kind": "synthetic"},
            "training": {"sequence_length": 512, "micro_batch_size": 1, "global_batch_size": 4, "steps": 1000},
            "optimizer": {"lr": 1e-3},
            "lr_schedule": {"kind": "constant"},
            "checkpoint": {"asynchronous": asynchronous, "path": place, "keep_last": 1},
            "device": "cpu",
        }
    )  # fmt: skip
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine, stream, run = build_engine(config, grid, torch.device("cpu")), build_train_stream(config), RunState()
    committed: list[int] = []
    saver = Saver(grid.world, asynchronous, make_pruner(config))

    def answer(steps: int) -> dict[str, Any]:
        seconds, stalls, lasted, began = [], [], [], {}
        for _ in range(steps):
            start = time.perf_counter()
            result = train_step(engine, stream, run, (saver.ready,))
            if result.votes[0] == grid.world.size:
                saver.advance()
                if not saver.busy:
                    committed.append(run.step)
                    lasted.append(run.step - began.pop("step"))
            stall = saver.stall_seconds()
            if run.step % every == 0:
                began["step"] = run.step
                start_save(saver, engine, run, {}, {})
                stall += saver.stall_seconds()
                if not saver.busy:
                    lasted.append(0)
                    began.clear()
            stalls.append(stall)
            seconds.append(time.perf_counter() - start - stall)
        saver.finish()
        size = sum(
            values.nbytes for kind in engine.optimizer.state_kinds for _, values in engine.optimizer.state_pieces(kind)
        )  # fmt: skip
        return {
            "step_seconds": statistics.median(seconds),
            "stall_seconds_of_a_save": sum(stalls) / max(1, len(lasted)),
            "steps_that_a_save_lasted": lasted,
            "bytes_of_a_rank": size,
        }

    return answer


def measure_stall(folder: Path, throttle: float, every: int, steps: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, asynchronous in (("background", True), ("at_once", False)):
        with Ranks(2, stall_rank, str(folder), asynchronous, throttle, every) as call:
            call(2)
            one = max(call(steps), key=lambda answer: answer["stall_seconds_of_a_save"])
        stall, step = one["stall_seconds_of_a_save"], one["step_seconds"]
        one["stall_of_a_save_in_steps"] = round(stall / step, 4)
        one["stall_of_100_steps_in_steps"] = round(stall / step / 100, 5)
        found[name] = {key: round(value, 4) if isinstance(value, float) else value for key, value in one.items()}
        shutil.rmtree(folder / "stall", ignore_errors=True)
    return found


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--megabytes", type=float, default=1000, help="of each rank (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--throttle", type=float, default=10e6, help="bytes a second and rank (default: %(default)s)")
    options.add_argument("--every", type=int, default=12, help="steps between saves (default: %(default)s)")
    options.add_argument("--steps", type=int, default=36)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    args = options.parse_args()
    conditions = machine("torch", threads=1)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmark-checkpoint-") as made:
        folder = Path(made)
        stall = measure_stall(folder, args.throttle, args.every, args.steps)
        speed = measure_speed(folder, args.ranks, args.megabytes, args.rounds)
    most_of_save = 1.02 * speed["share_mib"] + 64
    holds = {
        "save": speed["save"]["ratio"] >= LEAST,
        "load": speed["load"]["ratio"] >= LEAST,
        "memory_of_a_save": speed["extra_mib_at_most"]["save"] <= most_of_save,
        "memory_of_a_load": speed["extra_mib_at_most"]["load"] <= 1024,
        "stall": stall["background"]["stall_of_100_steps_in_steps"] < MOST_STALL,
    }
    claim = "saving and loading at 0.9 of torch.save and torch.load, one copy of the share, and no stall but for the copy"
    return finish(args.output, claim, all(holds.values()), conditions, claims=holds, speed=speed, stall=stall)


if __name__ == "__main__":
    sys.exit(main())
