"""How adapters are cut: every element is somewhere, and all ranks have room for the largest share."""

from __future__ import annotations

import pytest
import torch

from megatron_llm.models.stages import build_stages, parameters
from megatron_llm.optim.layout import shard_of
from megatron_llm.parallel.grid import Grid
from tests.decoders import DECODERS
from tests.runs import config_of


@pytest.mark.parametrize(("decoder", "tp"), [("neox", 3), ("falcon", 4), ("olmo2", 8), ("qwen3", 2)])
def test_ranks_of_uneven_shares_leave_room_for_the_largest(decoder: str, tp: int) -> None:
    config = config_of(model=DECODERS[decoder], parallel={"tensor_parallel": tp}, peft={"rank": 5})
    ranks = []
    for rank in range(tp):
        grid = Grid.imagined(config.parallel, config.model.num_key_value_heads, tp, rank)
        ranks.append(parameters(build_stages(config, grid, (0,), torch.float32, torch.device("meta"))))
    for copies in zip(*ranks, strict=True):
        specs = [shard_of(parameter) for parameter in copies]
        assert len({tuple(part.name for part in spec.parts) for spec in specs}) == 1
        most = max(parameter.numel() for parameter in copies)
        assert {max(spec.room, parameter.numel()) for spec, parameter in zip(specs, copies, strict=True)} == {most}
        for parts in zip(*(spec.parts for spec in specs), strict=True):
            elements = sum(logical.numel / part.replicas for part in parts for _, logical in part.pairs)
            assert elements == torch.Size(parts[0].shape).numel()
