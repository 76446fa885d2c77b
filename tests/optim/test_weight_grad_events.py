"""A bucket is reported complete once a step, when the last gradient of its last parameter is in its buffer, and not before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_llm.config import OptimizerConfig
from megatron_llm.optim.buffers import Bucket, on_last_weight_gradient
from megatron_llm.optim.zero1 import ZeroOptimizer
from megatron_llm.parallel.grid import Axis, Grid
from megatron_llm.parallel.linear import RowParallelLinear
from megatron_llm.parallel.shard import Box, Part, ShardSpec
from megatron_llm.parallel.weight_grad import WeightGradients

TOKENS, SIZE, LAYERS, MICROBATCHES = 3, 8, 6, 3


class _Scale(nn.Module):
    """A layer that knows nothing of main gradients: autograd makes its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))
        whole = Box.full((SIZE,))
        self.weight.shard = ShardSpec((Part("scale", (SIZE,), ((whole, whole),)),))  # type: ignore[attr-defined]

    def forward(self, x: Tensor, _: bool) -> Tensor:
        return x * self.weight


def _layers() -> list[nn.Module]:
    torch.manual_seed(0)
    rows = [RowParallelLinear(f"{i}", SIZE, SIZE, Axis("tp"), torch.float32, torch.device("cpu")) for i in range(LAYERS)]
    for layer in rows:
        nn.init.normal_(layer.weight)
    rows[1].weight.requires_grad_(False)
    return [*rows[:3], _Scale(), *rows[3:]]


def _run(split: bool) -> tuple[list[list[tuple[int, Tensor]]], list[Bucket], list[Tensor]]:
    """Two steps: per step, (bucket number, its gradients) as reported; buckets; their gradients at the end of the step."""
    layers = _layers()
    optimizer = ZeroOptimizer([layer.weight for layer in layers], Grid.single(), OptimizerConfig(lr=0.1), 2 * SIZE * SIZE)  # type: ignore[misc]
    gradients = WeightGradients(layers)
    reports: list[tuple[int, Tensor]] = []
    on_last_weight_gradient(
        optimizer.buckets, gradients, lambda bucket: reports.append((optimizer.buckets.index(bucket), bucket.grad.clone()))
    )
    steps = []
    for _ in range(2):
        optimizer.zero_gradients()
        gradients.begin_step(MICROBATCHES)
        for mb in range(MICROBATCHES):
            x = torch.full((TOKENS, SIZE), mb + 1.0, requires_grad=True)
            for layer in layers:
                x = layer(x, False)
            if split:
                with gradients.deferred(mb):
                    x.sum().backward()
            else:
                x.sum().backward()
        assert not (split and reports)
        for mb in range(MICROBATCHES if split else 0):
            gradients.run(mb)
        steps.append(list(reports))
        reports.clear()
    return steps, optimizer.buckets, [bucket.grad for bucket in optimizer.buckets]


def test_every_bucket_is_reported_when_it_is_complete() -> None:
    for split in (False, True):
        steps, buckets, final = _run(split)
        assert len(buckets) == 3
        for reports in steps:
            assert [number for number, _ in reports] == [0, 1, 2]  # in the order of backward, the last layers first
            for number, gradient in reports:
                assert gradient.any() and torch.equal(gradient, final[number])
