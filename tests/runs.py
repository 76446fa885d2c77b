"""Small complete training runs, on any layout, for tests: what a run did, as plain data that can be compared.

The functions run on worker ranks (`tests.ranks.run_ranks`), so they are module-level and return picklable things.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from megatron_llm.checkpoint import Saver
from megatron_llm.config import Config, parse_config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.models.recompute import Recompute
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import TensorSource
from megatron_llm.training.build import Engine, build_engine
from megatron_llm.training.recovery import known_facts, make_pruner, start_save
from megatron_llm.training.step import RunState, train_step

TINY: dict[str, Any] = {
    "model": {
        "vocab_size": 97,  # no TP size divides it
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "data": {"kind": "synthetic"},
    "training": {"sequence_length": 16, "micro_batch_size": 2, "global_batch_size": 8, "steps": 10, "seed": 7},
    "optimizer": {"lr": 1e-2, "grad_clip": 0.7},
    "lr_schedule": {"kind": "cosine", "warmup_steps": 3, "min_lr": 1e-3},
    "precision": {"compute": "float64"},
    "device": "cpu",
}


def config_of(base: dict[str, Any] = TINY, **sections: dict[str, Any]) -> Config:
    """`base` with some keys of some sections replaced."""
    raw = copy.deepcopy(base)
    for name, values in sections.items():
        raw.setdefault(name, {}).update(values)
    return parse_config(raw)


RECOMPUTE: dict[str, dict[str, Any]] = {
    "full": {"recompute": "full"},
    "full, every second layer": {"recompute": "full", "recompute_every": 2},
    "selective": {"recompute": "selective"},
    "selective, every second layer": {"recompute": "selective", "recompute_every": 2},
    "attention": {"recompute": "selective", "recompute_modules": ["attention"]},
    "norms": {"recompute": "selective", "recompute_modules": ["norms"]},
    "activation": {"recompute": "selective", "recompute_modules": ["activation"]},
}


def stage_of(
    config: Config, layers: range, first: bool = False, last: bool = False, dtype: torch.dtype = torch.float32
) -> DecoderStage:
    """A stage on one process, with zero weights."""
    return DecoderStage(
        config.model,
        Grid.single(),
        layers,
        first=first,
        last=last,
        sequence_parallel=False,
        dtype=dtype,
        device=torch.device("cpu"),
        recompute=Recompute.of(config.training),
    )


Pieces = list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]


def owned_weights(engine: Engine, kind: str = "weights") -> Pieces:
    """(name, shape, index, values) of what this rank would write to a checkpoint."""
    return [
        (piece.part.name, piece.part.shape, piece.box.slices, values.clone())
        for piece, values in engine.optimizer.state_pieces(kind)
        if piece.part.replica_rank == 0
    ]


def assemble(ranks: list[Pieces]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' pieces. Fails unless every element is held exactly once."""
    tensors: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for pieces in ranks:
        for name, shape, index, values in pieces:
            tensors.setdefault(name, torch.zeros(shape, dtype=values.dtype))[index] = values
            counts.setdefault(name, torch.zeros(shape, dtype=torch.int32))[index] += 1
    for name, count in counts.items():
        assert torch.equal(count, torch.ones_like(count)), f"{name} is not tiled exactly once"
    return tensors


def save_run(engine: Engine, state: RunState) -> None:
    """Write a checkpoint into the run folder, at once. Collective."""
    saver = Saver(engine.grid.world, False, make_pruner(engine.config))
    start_save(saver, engine, state, {}, known_facts(engine.config), wait=True)


def train(
    config: Config, steps: int | None = None, weights: TensorSource | None = None
) -> tuple[list[tuple[float, float, bool]], Pieces]:
    """Run on this rank: (loss, gradient norm, skipped) of each step, and the weights owned at the end."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"), weights)
    stream, state = build_train_stream(config), RunState()
    history = []
    for _ in range(config.training.steps if steps is None else steps):
        result = train_step(engine, stream, state)
        history.append((result.loss, result.grad_norm, result.skipped))
    return history, owned_weights(engine)
