"""Real runs on a blend of two sources, for tests of runs that end early, and whether two runs did the same to the bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_llm.checkpoint.load import open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.parallel.shard import Box, Part
from tests.launch import Ending, launch
from tests.training.commands import read_metrics, write_config
from tests.training.small import SMALL

MEASURED = ("tokens_per_second", "tflops_per_device", "mfu", "step_seconds", "memory_peak_bytes", "checkpoint_stall_seconds")

KEEP_LAST = 2  # checkpoints

SAVING: dict[str, dict[str, Any]] = {"in the background": {}, "at once": {"asynchronous": False}}
"""The ways to save that tests of interrupted saves go through, by name: the `checkpoint` section of each."""


def blend(data: Path, more_data: Path, run: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """The raw config of a run in `run` that saves after every step. 158 and 87 tokens make 19 and 10 rows of 8: a source is
    read again and again, and no step of 6 rows ends with one."""
    raw: dict[str, Any] = {name: dict(values) if isinstance(values, dict) else values for name, values in SMALL.items()}
    raw["model"] |= {"num_hidden_layers": 2}
    sources = [{"path": str(data), "epochs": 3}, {"path": str(more_data), "epochs": 2}]
    raw |= {
        "data": {"kind": "pretrain", "train": sources},
        "optimizer": raw["optimizer"] | {"ema_decay": 0.9},
        "precision": {"compute": "float32"},
        "checkpoint": {"every_steps": 1, "keep_last": KEEP_LAST},
        "logging": {"run_dir": str(run)},
    }
    for name, values in sections.items():
        raw.setdefault(name, {}).update(values)
    return raw


@dataclass(frozen=True)
class Job:
    """A config file, how many ranks run it, and its run folder."""

    world: int
    config: Path
    run: Path

    @classmethod
    def make(cls, world: int, raw: dict[str, Any]) -> Job:
        run = Path(raw["logging"]["run_dir"])
        run.parent.mkdir(parents=True, exist_ok=True)
        return cls(world, write_config(run.parent / f"{run.name}.yaml", raw), run)

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def start(self, *overrides: str, **how: Any) -> list[Ending]:
        """Run the command; `how` is for `launch`."""
        return launch(self.world, main, ["train", str(self.config), *overrides], **how)

    def finish(self, *overrides: str) -> None:
        """Run the command to a good end."""
        endings = self.start(*overrides)
        assert [ending.code for ending in endings] == [0] * self.world, logs(endings)


def logs(endings: list[Ending]) -> str:
    return "\n".join(f"--- rank {rank}: {ending.code}\n{ending.log}" for rank, ending in enumerate(endings))


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def whole_steps(checkpoints: Path) -> list[int]:
    """Steps of the folders that have a manifest, which says that they are whole."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in checkpoints.glob("step-*/manifest.json"))


def contents(checkpoints: Path, step: int) -> dict[str, Any]:
    """Everything that a run continues with, by name: tensors of all kinds and the state. Every checksum is compared first."""
    checkpoint = open_checkpoint(step_folder(checkpoints, step))
    checkpoint.verify()
    found: dict[str, Any] = dict(checkpoint.run_state)
    for kind in checkpoint.kinds:
        source = checkpoint.source(kind)
        for name, info in checkpoint.tensors(kind).items():
            found[f"{kind}/{name}"] = source.read(Part(name, info.shape, ()), Box.full(info.shape))
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names in `contents` that are not the same to the bit in both."""
    return [name for name in sorted(found.keys() | expected.keys()) if not _same(found.get(name), expected.get(name))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    return type(a) is type(b) and bool(a == b)


def trained(run: Path) -> list[str]:
    """The lines of the metrics, without what is measured."""
    lines = read_metrics(run)
    return [json.dumps({key: value for key, value in line.items() if key not in MEASURED}) for line in lines]


def assert_same_end(job: Job, undisturbed: Job, step: int) -> None:
    """The last checkpoint and all metrics are those of a run that nothing happened to."""
    assert whole_steps(job.checkpoints)[-1] == step
    expected = contents(undisturbed.checkpoints, step)
    assert {name.split("/")[0] for name in expected} >= {"weights", "m", "v", "ema", "step", "rows"}
    assert differences(contents(job.checkpoints, step), expected) == []
    assert trained(job.run) == trained(undisturbed.run)[: len(trained(job.run))]
    assert len(trained(job.run)) == step


def assert_whole_ones_are_right(job: Job, undisturbed: Job) -> None:
    """Every checkpoint that says that it is whole is so, and is what the undisturbed run had at that step."""
    for step in whole_steps(job.checkpoints):
        assert differences(contents(job.checkpoints, step), contents(undisturbed.checkpoints, step)) == [], step
