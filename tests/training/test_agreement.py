"""Ranks that were started with different settings do not begin; nor do they wait for each other."""

from __future__ import annotations

import torch

from megatron_llm.config import Config
from megatron_llm.training.agreement import AgreedError, check_same_config, name_ranks
from tests.ranks import run_ranks
from tests.runs import config_of


def agree(configs: list[Config]) -> str:
    rank = torch.distributed.get_rank()
    try:
        check_same_config(configs[rank])
    except AgreedError as error:
        return str(error)
    return ""


def test_different_settings_are_named_with_their_ranks_on_every_rank() -> None:
    seeds = [config_of(training={"seed": 8 if rank == 2 else 7}) for rank in range(3)]
    (said,) = set(run_ranks(3, agree, seeds))
    assert said.startswith("ranks were started with different settings: training.seed is 7 on ranks 0 and 1, 8 on rank 2. Give")
    layouts = [config_of(parallel={"tensor_parallel": size}, optimizer={"lr": lr}) for size, lr in ((1, 1e-3), (2, 1e-4))]
    (said,) = set(run_ranks(2, agree, layouts))
    assert "optimizer.lr is 0.001 on rank 0, 0.0001 on rank 1; parallel.tensor_parallel is 1 on rank 0, 2 on rank 1. " in said
    assert run_ranks(3, agree, [config_of()] * 3) == [""] * 3


def test_many_ranks_are_counted() -> None:
    assert name_ranks(list(range(100))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"
