"""How long a step takes on a device: a latency-bandwidth model around the simulated schedule. Called by `planning/layouts.py`.

    step = makespan of the schedule (pipeline/simulate.py)
           + exposed exchange of gradients and weights + optimizer
    F of a stage  = sum over its layers of
           products      2 T K N / (products * peak)  +  bytes of their operands / stream
           scores        their FLOPs / (scores * peak)
           element-wise  bytes that norms, rotation and activation move / stream
           tensor parallelism      4 transfers of [T, H], of which `exposed` is waited for
           context parallelism     what the ring of keys and values takes longer than the scores that hide it
    B likewise: products twice (the second time, for weights, with the sums in float32), scores 2.5 times, six transfers.

A collective of n bytes over d ranks in k nodes takes n (d - 1) / d / bandwidth + call + (k - 1) network hops + (d - k) hops: a
ring, over NVLink while the ranks that it joins are in one node, else over the network, with the adapters of all ranks that it
has in a node. (NCCL has trees for all-reduces, which are not used here.) Gradients go out in buckets behind the last backward of
a rank and weights come in before its first forwards; only what is longer than those is waited for, and the bucket that is
complete last, or needed first: with many ranks buckets are large, at last one for all, and nothing hides. Axes are cut as
`parallel/grid.py` does: tensor-parallel ranks are neighbours, then context, data and pipeline.

Shape suffixes: T tokens of a micro-batch on a rank, H hidden, K and N sides of a product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_llm.config import Config
from megatron_llm.optim.layout import default_bucket_size
from megatron_llm.pipeline.simulate import Costs
from megatron_llm.planning.activations import compute_bytes
from megatron_llm.planning.hardware import SHARES, Device, Shares
from megatron_llm.planning.share import Share
from megatron_llm.planning.stages import Speed

WIDE = 4  # bytes of main gradients


@dataclass(frozen=True)
class Modelled:
    """The assumptions about a device, for `planning/compare.py`."""

    device: Device
    shares: Shares = SHARES

    def speed(self, config: Config, world: int) -> Speed:
        """What a stage's costs are made of."""
        device, shares, parallel = self.device, self.shares, config.parallel
        parts = layer_parts(config, self).values()
        inside = parallel.tensor_parallel * parallel.context_parallel
        replicas = world // (inside * parallel.pipeline_parallel)
        return Speed(
            products=shares.products * device.flops,
            scores=shares.scores * device.flops,
            scores_backward=shares.scores_backward * device.flops * 2 / 2.5,  # of what is counted: twice the forward
            bandwidth=self.bandwidth(inside * replicas * 2),
            layer=(sum(forward for forward, _ in parts), sum(backward for _, backward in parts)),
            head=_head(config, self),
            **_again(config, self),
        )

    def outside(self, config: Config, world: int, costs: Costs, parameters: float) -> dict[str, float]:
        """Seconds of a step that are not in the schedule. parameters: trained ones of the fullest rank."""
        parallel = config.parallel
        inside = parallel.tensor_parallel * parallel.context_parallel
        ranks = world // (parallel.tensor_parallel * parallel.pipeline_parallel)  # data and context
        owned = parameters / (ranks if parallel.zero_stage else 1)
        state = 30.0 * owned / (self.shares.stream * self.device.stream)
        if ranks == 1:
            return {"optimizer": state, "gradients": 0.0, "weights": 0.0}
        span = inside * (ranks // parallel.context_parallel)
        sent = 2 if config.precision.gradient_reduction == "bfloat16" else WIDE
        pieces = len(costs.forward) // parallel.pipeline_parallel
        hidden = sum(sorted(b + w for b, w in zip(costs.backward, costs.weight, strict=True))[-pieces:])
        before = sum(sorted(costs.forward)[-pieces:])
        buckets = math.ceil(parameters / (parallel.bucket_size or default_bucket_size(round(parameters), ranks)))
        # The last one, or the first, is never hidden (`optim/layout.py`); the embedding alone is about an eighth.
        bucket = max(1 / 8, 1 / buckets) if parallel.overlap else 1.0
        gradients = self.collective(sent * parameters, ranks, span, buckets)
        weights = self.collective(compute_bytes(config) * parameters, ranks, span, buckets)
        if not parallel.overlap:
            hidden = before = 0.0
        return {
            "optimizer": state,
            "gradients": max(gradients * bucket, gradients - hidden),
            "weights": max(weights * bucket, weights - before),
        }

    def bandwidth(self, span: int, together: float = 1.0) -> float:
        """Bytes/s, one way, between ranks that lie within `span` neighbouring ones, `together` of them in a node."""
        device = self.device
        return self.shares.link * (device.link if span <= device.node else min(device.link, device.network * together))

    def collective(self, size: float, ranks: int, span: int, calls: int = 1) -> float:
        """Seconds of all-gathers or reduce-scatters of `size` bytes in all, by so many calls, among ranks that lie within `span`.

        A ring passes through every node once: a hop over the network for each, the others inside. There are as many rings as
        ranks in a node, each over an adapter of its own.
        """
        if ranks == 1:
            return 0.0
        nodes = min(ranks, math.ceil(span / self.device.node))
        shares = self.shares
        latency = shares.call + (nodes - 1) * shares.network_hop + (ranks - nodes) * shares.hop
        return size * (ranks - 1) / ranks / self.bandwidth(span, ranks / nodes) + calls * latency


def layer_parts(config: Config, model: Modelled) -> dict[str, tuple[float, float]]:
    """Seconds of a layer's forward and backward besides FLOPs, by what they go to."""
    it, parallel, share = config.model, config.parallel, Share.of(config)
    t, h, size = tokens(config), it.hidden_size, compute_bytes(config)
    tp, cp = parallel.tensor_parallel, parallel.context_parallel
    shard = t / (tp if parallel.sequence_parallel else 1)
    stream = model.shares.stream * model.device.stream
    up = share.inner * (2 if it.mlp_gated else 1)
    queries, keys = share.queries * it.head_dim, share.keys * it.head_dim
    sides = [(h, queries + 2 * keys), (queries, h), (h, up), (share.inner, h)]
    operands = sum(size * (t * k + k * n + t * n) for k, n in sides)
    sums = sum(2 * WIDE * k * n for k, n in sides)
    norms = 2 * 4 * size * shard * h  # two, each with the addition before it: read x and f, write their sum and the result
    elements = norms + size * t * (2 * (queries + keys) + up + share.inner)
    backward_elements = norms + size * t * (2 * (queries + keys) + 2 * up + share.inner)
    transfer = model.collective(size * t * h, tp, tp) * model.shares.exposed
    ring = 0.0
    if cp > 1:
        seen = 2 * it.head_dim * share.queries * config.training.sequence_length / 2
        scores = 2.0 * t * seen / (model.shares.scores * model.device.flops)
        ring = max(0.0, (cp - 1) * 2 * size * t * keys / model.bandwidth(tp * cp) - scores)
    return {
        "memory": ((operands + elements) / stream, (2 * operands + sums + backward_elements) / stream),
        "tensor parallel": (4 * transfer, 6 * transfer),
        "context parallel": (ring, 2 * ring),
    }


def _again(config: Config, model: Modelled) -> dict[str, float]:
    """Seconds to make norms and activation of a layer again: read, and written."""
    it, parallel, share, size, t = config.model, config.parallel, Share.of(config), compute_bytes(config), tokens(config)
    shard = t / (parallel.tensor_parallel if parallel.sequence_parallel else 1)
    stream = model.shares.stream * model.device.stream
    return {
        "norms": 2 * 2 * size * shard * it.hidden_size / stream,
        "activation": size * t * share.inner * (3 if it.mlp_gated else 2) / stream,
    }


def _head(config: Config, model: Modelled) -> float:
    """The same of the head and the loss, all in forward: logits written, read, and overwritten by their gradient."""
    t, v, size = tokens(config), Share.of(config).vocabulary, compute_bytes(config)
    return 6.0 * size * t * v / (model.shares.stream * model.device.stream)


def tokens(config: Config) -> float:
    """Of a micro-batch on a rank, between tensor-parallel regions."""
    training = config.training
    return training.micro_batch_size * training.sequence_length / config.parallel.context_parallel
