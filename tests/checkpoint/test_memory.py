"""Peak memory: a save holds one copy of what a rank owns, or none; a load holds a slab, whatever the layout that wrote it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_llm.checkpoint import Contents, Saver, TensorToSave, open_checkpoint
from megatron_llm.ops.storage import open_folder
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part, fill
from tests.ranks import run_ranks

MEBIBYTE = 2**20
SHAPES = {"embedding": (12_000, 4096), "row": (3_000_000,), "norm": (4096,)}  # 188, 11 and 0 MiB


def _extra(work: Callable[[], object]) -> float:
    """MiB that the process holds at most while it works, beyond what it held before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def peaks(folder: Path) -> dict[str, float]:
    """On a process of its own."""
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    items = [TensorToSave("weights", name, SHAPES[name], Box.full(SHAPES[name]), value) for name, value in tensors.items()]
    found = {"share": sum(value.nbytes for value in tensors.values()) / MEBIBYTE}

    def save(step: int, asynchronous: bool) -> None:
        saver = Saver(Axis("world"), asynchronous, lambda _: None)
        saver.start(open_folder(folder).child(f"step-{step:08d}"), items, Contents({"step": step}, {}))
        saver.finish()

    save(0, asynchronous=False)  # whatever is needed once
    found["save at once"] = _extra(lambda: save(1, asynchronous=False))
    found["save behind"] = _extra(lambda: save(2, asynchronous=True))

    def load(columns: slice) -> None:
        checkpoint = open_checkpoint(folder / "step-00000002")
        checkpoint.verify()
        source = checkpoint.source("weights")
        for name, value in tensors.items():
            box, target = Box.full(SHAPES[name]), value
            if value.dim() == 2:
                target = value[:, columns]
                box = Box((0, columns.start), tuple(target.shape))
            for _ in fill(target, Part(name, SHAPES[name], ()), box, source):
                pass

    found["load"] = _extra(lambda: load(slice(0, 4096)))
    found["load columns"] = _extra(lambda: load(slice(1024, 2048)))
    return found


def test_a_save_holds_one_copy_and_a_load_a_slab(tmp_path: Path) -> None:
    (found,) = run_ranks(1, peaks, tmp_path)
    assert found["share"] > 190
    assert 0.9 * found["share"] < found["save behind"] < found["share"] + 24, found
    assert found["save at once"] < 24 and found["load"] < 128 and found["load columns"] < 128, found
