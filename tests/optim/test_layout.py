"""Ranks of tensor parallelism with different shares lay their parameters out alike: slices of copies must coincide."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_llm.config import ModelConfig
from megatron_llm.models.heads import head_problem
from megatron_llm.models.stages import build_stages, parameters
from megatron_llm.optim.layout import bucket_layout
from megatron_llm.parallel.grid import Axis, Grid
from tests.decoders import DECODERS
from tests.runs import config_of


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("name", DECODERS)
def test_buckets_of_all_ranks_are_alike(name: str, tp: int) -> None:
    config = config_of(model=DECODERS[name], parallel={"tensor_parallel": tp})
    if head_problem(ModelConfig(**DECODERS[name]), tp):
        pytest.skip("heads cannot be cut so")
    copies = max(1, tp // config.model.num_key_value_heads)
    found = []
    for rank in range(tp):
        grid = replace(Grid.single(), tp=Axis("tp", rank, tp), kv_replica=Axis("kv", rank % copies, copies))
        held = parameters(build_stages(config, grid, (0,), torch.float32, torch.device("meta")))
        layouts = bucket_layout(held, ranks=3, bucket_size=500)
        found.append([(layout.share, [(span.start, span.spec.parts[0].name) for span in layout.spans]) for layout in layouts])
    assert all(layouts == found[0] for layouts in found)
