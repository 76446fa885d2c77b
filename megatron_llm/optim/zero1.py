"""ZeRO-1 (Rajbhandari et al. 2020): optimizer state cut over data parallelism. Called by `training/step.py`.

One step, for every bucket of flat gradients:

    reduce-scatter gradients over dp x cp      each rank then owns 1/d of them
    add partial gradients of replicas          (sequence-parallel norms, copied KV heads, tied embeddings)
    sum of squares, once per logical element   -> all-reduced by the caller together with the loss
    AdamW on the owned slice                   float32 master, m, v
    all-gather weights                         rounded to the compute dtype

Bytes per parameter with bfloat16 compute and d ranks: 2 + 4 + 12 / d. When compute and master dtype are equal, the
master is the weight itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron_llm.config import OptimizerConfig
from megatron_llm.ops.adamw import adamw_
from megatron_llm.optim.buffers import Bucket, make_buckets
from megatron_llm.parallel.collectives import all_reduce, start_all_gather, start_reduce_scatter
from megatron_llm.parallel.grid import Axis, Grid
from megatron_llm.parallel.shard import Piece, TensorSource
from megatron_llm.parallel.weight_grad import count_weight_gradient

STATE_KINDS = ("weights", "m", "v")


class _Shard:
    """This rank's slice of one bucket: master weights, moments, and which of its elements decay."""

    def __init__(self, bucket: Bucket):
        self.bucket = bucket
        own = bucket.own_data
        self.separate_master = own.dtype is not bucket.grad.dtype
        self.master = own.to(bucket.grad.dtype, copy=True) if self.separate_master else own
        self.m, self.v = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.decay = [slice(a, b) for span, a, b in bucket.owned_spans() if span.spec.decay]
        self.no_decay = [slice(a, b) for span, a, b in bucket.owned_spans() if not span.spec.decay]

    def state(self, kind: str) -> Tensor:
        return {"weights": self.master, "m": self.m, "v": self.v}[kind]


class ZeroOptimizer:
    """Owns the flat buffers of the parameters it is given and updates them.

    Parameters must carry a ShardSpec (`parameter.shard`); their storage moves into the buffers.
    """

    def __init__(self, parameters: list[nn.Parameter], grid: Grid, config: OptimizerConfig, bucket_size: int):
        self.grid, self.config = grid, config
        self.buckets = make_buckets(parameters, grid.dp_cp, bucket_size)
        self.shards = [_Shard(bucket) for bucket in self.buckets]
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_move_to_main_grad)

    def zero_gradients(self) -> None:
        """Forget the last step's gradients."""
        for bucket in self.buckets:
            bucket.grad.zero_()

    def reduce_gradients(self) -> Tensor:
        """Complete the owned gradients. Returns this rank's share of the sum of squares: a scalar.

        Summed over all ranks the shares give the squared norm of the whole model's gradient, every logical element
        counted once. Collective over dp_cp and over the replicas' axes.
        """
        axis = self.grid.dp_cp
        handles = [start_reduce_scatter(bucket.grad, axis, bucket.own_grad) for bucket in self.buckets if axis.size > 1]
        for handle in handles:
            handle.wait()
        self._sum_replicas()
        if not self.buckets:  # a pipeline stage without layers
            return torch.zeros(())
        total = torch.zeros((), dtype=self.buckets[0].grad.dtype, device=self.buckets[0].grad.device)
        for bucket in self.buckets:
            own = bucket.own_grad
            total += own.dot(own)
            for part, a, b in bucket.owned_ranges():
                total -= (1.0 - 1.0 / part.replicas) * own[a:b].dot(own[a:b])
        return total

    def _sum_replicas(self) -> None:
        """One all-reduce per axis adds the partial gradients that replicas hold. They own equal slices of them."""
        ranges: dict[str, tuple[Axis, list[Tensor]]] = {}
        for bucket in self.buckets:
            for part, a, b in bucket.owned_ranges():
                if part.gradient_sum is not None:
                    ranges.setdefault(part.gradient_sum.name, (part.gradient_sum, []))[1].append(bucket.own_grad[a:b])
        for _, (axis, views) in sorted(ranges.items()):
            total = all_reduce(torch.cat(views), axis)
            for view, value in zip(views, total.split([view.numel() for view in views]), strict=True):
                view.copy_(value)

    def update(self, number: int, lr: float, scale: float) -> None:
        """AdamW update `number` (from 1) with gradients multiplied by `scale`, then every rank gets the new weights."""
        for shard in self.shards:
            grad = shard.bucket.own_grad
            for parts, decay in ((shard.decay, self.config.weight_decay), (shard.no_decay, 0.0)):
                adamw_(
                    [shard.master[part] for part in parts],
                    [grad[part] for part in parts],
                    [shard.m[part] for part in parts],
                    [shard.v[part] for part in parts],
                    scale=scale,
                    update=number,
                    lr=lr,
                    betas=self.config.betas,
                    eps=self.config.eps,
                    weight_decay=decay,
                )
        self._publish_weights()

    def _publish_weights(self) -> None:
        """Round the masters to compute weights and gather them on every rank."""
        handles = []
        for shard in self.shards:
            if shard.separate_master:
                shard.bucket.own_data.copy_(shard.master)
            if self.grid.dp_cp.size > 1:
                handles.append(start_all_gather(shard.bucket.own_data, self.grid.dp_cp, shard.bucket.data))
        for handle in handles:
            handle.wait()

    def state_pieces(self, kind: str) -> Iterator[tuple[Piece, Tensor]]:
        """Every rectangle of a logical tensor in this rank's share of `weights`, `m` or `v`, as a view of the state."""
        for shard in self.shards:
            state = shard.state(kind)
            for piece, a, b in shard.bucket.owned_pieces():
                yield piece, piece.view(state[a:b])

    def load(self, kind: str, source: TensorSource) -> None:
        """Fill `weights`, `m` or `v` from a source. Weights enter the masters unrounded. Collective over dp_cp."""
        with torch.no_grad():
            for piece, view in self.state_pieces(kind):
                view.copy_(source.read(piece.part, piece.box))
            if kind == "weights":
                self._publish_weights()


def _move_to_main_grad(parameter: Tensor) -> None:
    """For gradients that autograd made, where a layer knows nothing of main gradients: add them there and free them."""
    if parameter.grad is None:  # the layer's own backward has added it, or left it to W
        return
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None
    count_weight_gradient(parameter)
