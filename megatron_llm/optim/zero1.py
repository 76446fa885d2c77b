"""ZeRO-1 (Rajbhandari et al. 2020): optimizer state cut over data parallelism. Called by `training/step.py`.

One step, for every bucket of flat gradients:

    reduce-scatter gradients over dp x cp      each rank then owns 1/d of them; begins in the backward that completes the bucket
    add partial gradients of replicas          (sequence-parallel norms, copied KV heads, tied embeddings)
    sum of squares, once per logical element   -> all-reduced by the caller together with the loss
    update of the owned slice                  float32 master and moments, rounded to the compute dtype in the same pass
    all-gather weights                         ends in the next forward, before the layer that needs them

Bytes per parameter with bfloat16 compute and d ranks: 2 + 4 + 12 / d; other choices: `docs/memory.md`. When compute and master
dtype are equal, the master is the weight itself. With `zero_stage` 0 the summed gradients are gathered instead of the weights,
and every rank updates everything: the sums, the norm and the update are those of stage 1 to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from megatron_llm.config import OptimizerConfig, PrecisionConfig
from megatron_llm.ops.grad_norm import sum_of_squares
from megatron_llm.optim.buffers import Bucket, on_last_weight_gradient
from megatron_llm.optim.layout import bucket_layout, shard_of
from megatron_llm.optim.rules import MOMENTS, rules_of
from megatron_llm.optim.state import State
from megatron_llm.parallel.collectives import Handle, all_reduce, start_all_gather
from megatron_llm.parallel.grid import Axis, Grid
from megatron_llm.parallel.shard import Piece, TensorSource, fill, pieces
from megatron_llm.parallel.weight_grad import WeightGradients, count_weight_gradient


class ZeroOptimizer:
    """Owns the flat buffers of the parameters it is given and updates them.

    Parameters must carry a ShardSpec (`parameter.shard`); the storage of those that take gradients moves into the buffers.

    Args:
        bucket_size: elements; None: by rule (`layout.default_bucket_size`).
        zero_stage: 1, or 0: every rank keeps all state.
        kernel: that updates and sums squares, "torch" or "triton".

    Attributes:
        state_kinds: what a checkpoint must keep: `weights` (masters), moments, and the averaged weights `ema`.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        grid: Grid,
        config: OptimizerConfig,
        bucket_size: int | None = None,
        precision: PrecisionConfig | None = None,
        zero_stage: int = 1,
        kernel: str = "torch",
    ):
        self.grid, self.config, self.zero_stage, self._kernel = grid, config, zero_stage, kernel
        axis, narrow, precision = grid.dp_cp, torch.bfloat16, precision or PrecisionConfig()
        main = narrow if precision.gradients == "bfloat16" else None
        sent = narrow if precision.gradient_reduction == "bfloat16" else None
        layouts = bucket_layout(parameters, axis.size, bucket_size, lambda parameter: rules_of(parameter, config))
        self.buckets = [Bucket(layout, axis, main, sent) for layout in layouts]
        self.states = [State(bucket, config, zero_stage == 0, kernel) for bucket in self.buckets]
        self.frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        self.state_kinds = ("weights", *MOMENTS[config.name], *(["ema"] if config.ema_decay else []))
        self._gathering: dict[Bucket, Handle] = {}  # weights, or with stage 0 the summed gradients
        self._overlap = False
        for bucket in self.buckets:
            for span in bucket.spans:
                span.parameter.register_post_accumulate_grad_hook(_move_to_main_grad)

    def overlap(self, gradients: WeightGradients, needed: Mapping[int, Iterable[nn.Parameter]]) -> Callable[[int], None]:
        """From now on exchange gradients in the backward that completes them, and let weights arrive in the next forward.

        needed: the parameters that each layer reads, by its index. Returns what must be called before a layer runs.
        """
        on_last_weight_gradient(self.buckets, gradients, Bucket.start_reduce)
        self._overlap = True
        bucket_of = {span.parameter: bucket for bucket in self.buckets for span in bucket.spans}
        buckets = {
            layer: list(dict.fromkeys(bucket_of[parameter] for parameter in parameters if parameter in bucket_of))
            for layer, parameters in needed.items()
        }
        return lambda layer: self._await(buckets.get(layer, []))

    def wait_weights(self) -> None:
        """Return when the new weights of all layers are there."""
        self._await(self.buckets)

    def _await(self, buckets: Iterable[Bucket]) -> None:
        for bucket in buckets:
            if handle := self._gathering.pop(bucket, None):
                handle.wait()

    def zero_gradients(self) -> None:
        """Forget the last step's gradients."""
        if self.zero_stage == 0:  # of a step that was skipped
            self._await(self.buckets)
        for bucket in self.buckets:
            bucket.forget_gradients()

    def reduce_gradients(self) -> Tensor:
        """Complete the owned gradients. Returns this rank's share of the sum of squares: a scalar.

        Summed over all ranks the shares give the squared norm of the whole model's gradient, every logical element
        counted once. Collective over dp_cp and over the replicas' axes.
        """
        for bucket in self.buckets:
            bucket.start_reduce()
        for bucket in self.buckets:
            bucket.finish_reduce()
        self._sum_replicas()
        if self.zero_stage == 0:
            self._gathering = {bucket: bucket.start_gather() for bucket in reversed(self.buckets)}
        if not self.buckets:  # a pipeline stage without layers, or with frozen ones only
            return torch.zeros(())
        total = torch.zeros((), dtype=self.buckets[0].wide, device=self.buckets[0].grad.device)
        for bucket in self.buckets:
            own = bucket.own_grad
            total += sum_of_squares(own, self._kernel)
            for part, a, b in bucket.owned_replicas():
                total -= (1.0 - 1.0 / part.replicas) * sum_of_squares(own[a:b], self._kernel)
        return total

    def _sum_replicas(self) -> None:
        """One all-reduce per axis adds the partial gradients that replicas hold. They own equal slices of them."""
        ranges: dict[str, tuple[Axis, list[Tensor]]] = {}
        for bucket in self.buckets:
            for part, a, b in bucket.owned_replicas():
                if part.gradient_sum is not None:
                    ranges.setdefault(part.gradient_sum.name, (part.gradient_sum, []))[1].append(bucket.own_grad[a:b])
        for _, (axis, views) in sorted(ranges.items()):
            total = all_reduce(torch.cat(views), axis)
            for view, value in zip(views, total.split([view.numel() for view in views]), strict=True):
                view.copy_(value)

    def owned_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, complete gradient) of every rectangle in this rank's slices, from `reduce_gradients` to `update`.

        Elements that several ranks of a model hold come from one of them.
        """
        for bucket in self.buckets:
            for piece, a, b in bucket.pieces(bucket.lo, bucket.hi):
                if piece.part.replica_rank == 0:
                    yield piece.part.name, piece.view(bucket.own_grad[a:b])

    def update(self, number: int, lr: float, scale: float) -> None:
        """Update `number` (from 1) with gradients multiplied by `scale`; then every rank gets the new weights.

        They arrive in the next forward if exchanges overlap; see `wait_weights`.
        """
        for state in reversed(self.states):  # the first layers' weights are needed first
            bucket = state.bucket
            gradient = bucket.own_grad if self.zero_stage else self._gathering.pop(bucket).wait()
            state.update(gradient, number, lr, scale)
            if self.zero_stage == 1:
                self._gather_weights(bucket)
        if not self._overlap:
            self.wait_weights()

    def _gather_weights(self, bucket: Bucket) -> None:
        if self.grid.dp_cp.size > 1:
            self._gathering[bucket] = start_all_gather(bucket.own_data, self.grid.dp_cp, bucket.data)

    def state_pieces(self, kind: str) -> Iterator[tuple[Piece, Tensor]]:
        """Every rectangle of a logical tensor in this rank's share of a kind of state, as a view of it.

        Frozen weights are their own average. They are dealt to the ranks one by one.
        """
        for state in self.states:
            yield from state.pieces(kind, state.bucket.lo, state.bucket.hi)
        if kind in ("weights", "ema"):
            for number, parameter in enumerate(self.frozen):
                if number % self.grid.dp_cp.size == self.grid.dp_cp.rank:
                    yield from _frozen_pieces(parameter)

    def load(self, kind: str, source: TensorSource, progress: Callable[[float], object] = lambda _: None) -> None:
        """Fill a kind of state from a source. Collective over dp_cp.

        Weights enter the masters unrounded, and the average begins with them: load `ema` after `weights`.

        progress: told again and again which part of this rank's share has been read.
        """
        with torch.no_grad():
            self.wait_weights()
            everything = [piece for state in self.states for piece in state.pieces(kind, state.lo, state.hi)]
            if kind == "weights":
                everything += [piece for parameter in self.frozen for piece in _frozen_pieces(parameter)]
            total, done = sum(view.numel() for _, view in everything), 0
            for piece, view in everything:
                for count in fill(view, piece.part, piece.box, source):
                    done += count
                    progress(done / total)
            if kind == "weights":
                for state in reversed(self.states):
                    state.begin_with_weights()
                    if self.zero_stage == 1:
                        self._gather_weights(state.bucket)
                self.wait_weights()


def _frozen_pieces(parameter: nn.Parameter) -> Iterator[tuple[Piece, Tensor]]:
    for piece in pieces(shard_of(parameter), tuple(parameter.shape)):
        yield piece, piece.view(parameter.data.view(-1))


def _move_to_main_grad(parameter: Tensor) -> None:
    """For gradients that autograd made, where a layer knows nothing of main gradients: add them there and free them."""
    if parameter.grad is None:  # the layer's own backward has added it, or left it to W
        return
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None
    count_weight_gradient(parameter)
