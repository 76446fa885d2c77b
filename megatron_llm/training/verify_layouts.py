"""The engine's forward pass in a layout, with the weights of a folder: what each rank of `verify --layouts` does.

Called by `training/verify.py`, here or in processes that it starts.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.config import Config, ModelConfig
from megatron_llm.hf.reader import HFFolder
from megatron_llm.parallel.collectives import all_gather
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.schedules import forward_only
from megatron_llm.training.build import build_pipeline
from megatron_llm.training.resolve import layout_problems
from megatron_llm.training.verify_text import Documents

MOST_PROCESSES = 64  # that a command starts on one machine


@dataclass(frozen=True)
class Layout:
    """One layout to try; data parallelism has no part in a forward pass."""

    name: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @classmethod
    def parse(cls, name: str) -> Layout:
        """`tp2`, `pp2`, `tp2pp2`. Raises ValueError for anything else."""
        found = re.findall(r"(tp|pp|dp)([1-9]\d{0,4})", name)
        sizes = {axis: int(size) for axis, size in found}
        if not found or len(sizes) < len(found) or "".join(map("".join, found)) != name:
            raise ValueError(f"--layouts: {name!r} is no layout such as tp2, pp2 or tp2pp2")
        return cls(name, sizes.get("tp", 1), sizes.get("pp", 1))

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def config(self, model: ModelConfig, tokens: int, dtype: str, timeout_seconds: float) -> Config:
        """The configuration of a run that would train in this layout on one row of at least `tokens` tokens."""
        return Config.model_validate(
            {
                "model": model.model_dump(exclude={"hf", "checkpoint", "checkpoint_ema", "resize_vocab"}),
                "parallel": {
                    "tensor_parallel": self.tensor_parallel,
                    "pipeline_parallel": self.pipeline_parallel,
                    "timeout_seconds": timeout_seconds,
                },
                "data": {"kind": "synthetic"},
                "training": {
                    "sequence_length": -(-tokens // self.tensor_parallel) * self.tensor_parallel,
                    "global_batch_size": 1,
                    "steps": 0,
                },
                "optimizer": {"lr": 1.0},
                "precision": {"compute": dtype},
            }
        )


def parse_layouts(names: Sequence[str], model: ModelConfig, world: int) -> list[Layout]:
    """The layouts of these names. Raises ValueError with every reason why one is impossible.

    world: ranks that a launcher has started; 1: the command will start them.
    """
    layouts = [Layout.parse(name) for name in names]
    problems = []
    for layout in layouts:
        config = layout.config(model, 1, "float32", 1.0)
        problems += [f"--layouts {layout.name}: {problem}" for problem in layout_problems(config, layout.ranks)]
        if world > 1 and layout.ranks != world:
            problems.append(
                f"--layouts {layout.name}: it has {layout.ranks} ranks, and {world} were started; start as many, or none "
                "(without torchrun the command starts them itself)"
            )
        if world == 1 and layout.ranks > MOST_PROCESSES:
            problems.append(
                f"--layouts {layout.name}: {layout.ranks} ranks are more than {MOST_PROCESSES}, the most that are started on one "
                "machine; use torchrun"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return layouts


@torch.no_grad()
def logits_of_layout(folder: str, config: Config, documents: Documents, device: str = "cpu") -> tuple[np.ndarray, float] | None:
    """(logits [T, V], mean loss) on rank 0, None on the others. Collective over all ranks of the default process group.

    Every rank reads its own part of the folder's weights.
    """
    grid, here = Grid.build(config.parallel, config.model.num_key_value_heads), torch.device(device)
    stages, runtime = build_pipeline(config, grid, here, HFFolder(folder).source(config.model))
    batch = documents.batch(grid.tp.size).to(here)
    results: list[tuple[Tensor, Tensor]] = []

    def forward(number: int, microbatch: int, x: Tensor | None) -> Tensor:
        stage = stages[number]
        hidden = stage(x, batch)
        if stage.last:
            loss = stage.loss(hidden, batch)
            local_TV = stage.logits(hidden).float()
            gathered_VT = all_gather(local_TV.t().contiguous(), grid.tp)
            results.append((gathered_VT[: config.model.vocab_size, : documents.tokens].t().contiguous(), loss.float()))
        return hidden

    runtime.run(forward_only(runtime.placement, 1), forward)
    found = _to_first_stage(grid, results, (documents.tokens, config.model.vocab_size), here)
    if not grid.world.first or found is None:
        return None
    logits_TV, loss = found
    return logits_TV.cpu().numpy(), float(loss) / float(batch.weights_T.sum())


def _to_first_stage(
    grid: Grid, results: list[tuple[Tensor, Tensor]], shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Logits and loss from the last stage to the first, over the column of the first tensor-parallel ranks."""
    pp = grid.pp
    if pp.size == 1:
        return results[0]
    if not grid.tp.first or not (pp.first or pp.last):
        return None
    if pp.last:
        for tensor in results[0]:
            dist.send(tensor, pp.ranks[0], group=pp.group)
        return None
    logits_TV, loss = torch.empty(shape, device=device), torch.empty((), device=device)
    for tensor in (logits_TV, loss):
        dist.recv(tensor, pp.ranks[-1], group=pp.group)
    return logits_TV, loss
