"""Trains in several layouts on the ranks that a launcher started, and writes what came of it. Started by `test_nccl.py`.

    python -m tests.gpu.layouts DEVICE FILE NAME...

The first rank writes FILE: {name: [[loss, gradient norm] of each step]}.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.distributed import process_group
from megatron_llm.training.replicas import check_replicas
from megatron_llm.training.step import RunState, train_step
from tests.runs import config_of

STEPS = 4
SECONDS = 120.0
SMALL_BUCKETS = {"bucket_size": 3000}  # several, so that exchanges overlap the backward
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    # First, when no kernel has been loaded: the host cannot load one while a receive waits for what that kernel is to make.
    "pp2": {"parallel": {"pipeline_parallel": 2}},
    "dp2": {"parallel": SMALL_BUCKETS},
    "dp2, ZeRO-0": {"parallel": {"zero_stage": 0, **SMALL_BUCKETS}},
    "tp2": {"parallel": {"tensor_parallel": 2}},
    "tp2, no sequence parallelism": {"parallel": {"tensor_parallel": 2, "sequence_parallel": False}},
    "tp2, recompute": {"parallel": {"tensor_parallel": 2}, "training": {"recompute": "full"}},
    "pp2, interleaved, tied": {
        "model": {"tie_word_embeddings": True},
        "parallel": {"pipeline_parallel": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2},
    },
    "pp2, zero-bubble V": {"parallel": {"pipeline_parallel": 2, "pipeline_schedule": "zb_v"}},
    "tp2 pp2": {"parallel": {"tensor_parallel": 2, "pipeline_parallel": 2}},
    "dp2, bfloat16 exchange": {
        "parallel": SMALL_BUCKETS,
        "precision": {"compute": "float32", "gradient_reduction": "bfloat16"},
        "optimizer": {"lr": 1e-3},  # small, so that rounded gradients stay near exact ones
    },
}


def config_for(name: str) -> Config:
    """Of a layout."""
    return config_of(**LAYOUTS[name])


def losses(config: Config, grid: Grid, device: torch.device) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    engine, stream, state = build_engine(config, grid, device), build_train_stream(config), RunState()
    results = [train_step(engine, stream, state) for _ in range(STEPS)]
    check_replicas(engine)
    return [(result.loss, result.grad_norm) for result in results]


def main(kind: str, file: str, *names: str) -> None:
    """Train in each of the layouts, in one process group."""
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # says where the rank hangs
    with process_group(device, timeout_seconds=SECONDS):
        found = {}
        for name in names:
            config = config_for(name)
            print(name, flush=True)
            found[name] = losses(config, Grid.build(config.parallel, config.model.num_key_value_heads), device)
        if dist.get_rank() == 0:
            Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
