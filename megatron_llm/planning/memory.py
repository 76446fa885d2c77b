"""Bytes that a rank needs, from the configuration alone. Called by `planning/compare.py`.

What stays is counted on the stages themselves, built without memory, and on the layout of their buckets: no formula to go
stale. What comes and goes is the peak of the simulated schedule (`planning/activations.py`), and what a layer works with besides:

    backward of a layer                   T * 4 F + T * H        gradients of its product, of gate and up and of its input,
                                                                 and what they are made of; less what the head has let go
    the same where it is split            T * 5 F + T * H        the product and what the head saved wait for W
    the same of a plain MLP               T * F + T * H          gradients of product and input, less the product, which is gone;
                                          T * 2 F + T * H        if it is not: relu reads it, or it waits for W
    attention and MLP side by side, split T * N * D more         the gradient of attention's output is there too
    explicit attention (soft-capped)      2 * T * N * L          of at least float32, less what the MLP saved, if nothing waits
    head and loss                         S * H + a chunk of logits (`parallel/head.py`), over tensor-parallel ranks two if there
                                          are more, their x and dx; without Triton's kernel a chunk of at least float32
                                          (`ops/cross_entropy.py`), two in other dtypes, and two more if logits are soft-capped
    recomputation                         what it brings back at once
    messages                              two ahead and one on its way out for every channel of the rank

At the end of the backward activations are gone, but gradients that are sent in another dtype than they are kept in need a copy.
Not counted: what a process needs before it has a model (on a GPU mostly CUDA's and NCCL's own), and what an allocator loses.
Dropout works with S * H and a chunk of random words (`ops/noise.py`), less than the MLP before or after it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from megatron_llm.config import Config
from megatron_llm.models.stages import build_stages, parameters
from megatron_llm.ops.cross_entropy import CHUNK_ELEMENTS
from megatron_llm.optim.layout import bucket_layout
from megatron_llm.optim.rules import MOMENTS, freeze, rules_of
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.head import chunk_tokens
from megatron_llm.pipeline.schedules import Schedule
from megatron_llm.planning.activations import compute_bytes, packed_attention, stage_bytes
from megatron_llm.planning.share import Share
from megatron_llm.planning.stages import stage_layers

_RECEIVED_AHEAD, _SENT = 2, 1  # messages of a channel beyond the one that is in use: `pipeline/messages.py`


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, by what they are for.

    Attributes:
        weights: in the compute dtype, frozen ones and padding included; gradients: main ones.
        state: masters, moments, averages.
        activations: at the peak of the schedule; working: what an action works with besides; messages: buffers between stages.
        exchange: of gradients, when activations are gone.
    """

    weights: float
    gradients: float
    state: float
    activations: float
    working: float
    messages: float
    exchange: float

    @property
    def persistent(self) -> float:
        """What stays from step to step."""
        return self.weights + self.gradients + self.state

    @property
    def total(self) -> float:
        """The peak."""
        return self.persistent + max(self.activations + self.working + self.messages, self.exchange)


@dataclass(frozen=True)
class BytesPerParameter:
    """Of each trainable parameter: compute weight, main gradient; state: of each that the rank owns."""

    weight: int
    gradient: int
    state: int

    @classmethod
    def of(cls, config: Config) -> BytesPerParameter:
        weight = compute_bytes(config)
        wide = max(weight, 4)
        optimizer = config.optimizer
        moment = 2 if optimizer.state_dtype == "bfloat16" and wide == 4 else wide
        state = wide * (weight < wide) + moment * len(MOMENTS[optimizer.name]) + wide * (optimizer.ema_decay is not None)
        return cls(weight, 2 if config.precision.gradients == "bfloat16" else wide, state)

    def persistent(self, ranks: int, zero_stage: int = 1) -> float:
        """Together, among that many data-parallel ranks."""
        return self.weight + self.gradient + self.state / (ranks if zero_stage else 1)


class Holdings(NamedTuple):
    """Parameters of a rank: elements that it owns of every bucket, and elements that are frozen."""

    buckets: list[int]
    frozen: int


Built = dict[tuple[object, ...], Holdings]
"""What ranks of one layout hold, by what tells them apart. To build stages takes longer than all else here."""


def rank_memory(
    config: Config, schedule: Schedule, peak: tuple[float, ...], world: int, built: Built | None = None
) -> list[RankMemory]:
    """The memory of every pipeline rank, on the first of its tensor- and data-parallel ranks; the others need no more.

    config: with the name of `schedule`. peak: of the simulation of it: bytes of activations by pipeline rank. built: kept by who
    asks for several schedules, micro-batches or recomputations of the same model, tensor- and pipeline-parallel size and world.
    """
    known = {} if built is None else built
    return [_Rank(config, schedule, rank, world, known).memory(peak[rank]) for rank in range(len(peak))]


def _holdings(config: Config, placement: tuple[int, ...], rank: int, world: int, built: Built) -> Holdings:
    """Ranks with as many layers in their stages hold as much, unless settings name parameters of single layers."""
    layers = stage_layers(config, placement)
    own = [stage for stage, owner in enumerate(placement) if owner == rank]
    ends = 0 in own, len(placement) - 1 in own
    named = bool(config.optimizer.rules) or config.peft is not None
    key = (*ends, *(layers[stage] if named else len(layers[stage]) for stage in own))
    if key not in built:
        grid = Grid.imagined(
            config.parallel, config.model.num_key_value_heads, world, rank * (world // config.parallel.pipeline_parallel)
        )
        held = parameters(build_stages(config, grid, placement, torch.float32, torch.device("meta")))
        freeze(held, config.optimizer, config.peft is not None)
        layouts = bucket_layout(held, grid.dp_cp.size, config.parallel.bucket_size, lambda p: rules_of(p, config.optimizer))
        frozen = sum(p.numel() for p in held if not p.requires_grad)
        built[key] = Holdings([layout.share for layout in layouts], frozen)
    return built[key]


class _Rank:
    """One pipeline rank."""

    def __init__(self, config: Config, schedule: Schedule, rank: int, world: int, built: Built):
        self.config, self.schedule, self.rank = config, schedule, rank
        parallel = config.parallel
        self.ranks = world // (parallel.pipeline_parallel * parallel.tensor_parallel)  # data- and context-parallel ones
        self.buckets, self.frozen = _holdings(config, schedule.placement, rank, world, built)
        self.size = compute_bytes(config)
        self.wide = max(self.size, 4)
        self.tokens = config.training.micro_batch_size * config.training.sequence_length
        self.shard = self.tokens / (parallel.tensor_parallel if parallel.sequence_parallel else 1)

    def memory(self, activations: float) -> RankMemory:
        each, ranks = BytesPerParameter.of(self.config), self.ranks
        own = sum(self.buckets)
        return RankMemory(
            weights=each.weight * (own * ranks + self.frozen),
            gradients=each.gradient * own * ranks,
            state=each.state * own * (1 if self.config.parallel.zero_stage else ranks),
            activations=activations,
            working=self._working(),
            messages=self._messages(),
            exchange=self._exchange(),
        )

    def _working(self) -> float:
        """The most over the stages; an action of one of them is at work when activations are at their peak."""
        model, size, wide = self.config.model, self.size, self.wide
        s, h = self.shard, model.hidden_size
        vocabulary = Share.of(self.config).vocabulary
        layers = stage_layers(self.config, self.schedule.placement)
        most = 0.0
        for stage in (stage for stage, owner in enumerate(self.schedule.placement) if owner == self.rank):
            first, last = stage == 0, stage == len(layers) - 1
            head = stage_bytes(self.config, range(0), False, last).forward
            if layers[stage]:
                norm = 5 * wide * s * h if size < wide else 0.0
                again = stage_bytes(self.config, layers[stage], first, last).again
                gone = 0.0 if self.schedule.split else head
                most = max(most, again + max(self._layer_backward(), norm) - gone)
            if last:
                most = max(most, self._head(vocabulary))
        return most

    def _head(self, vocabulary: int) -> float:
        """Head and loss of a chunk of tokens, where that of a former one may be alive."""
        size, wide, h, tp = self.size, self.wide, self.config.model.hidden_size, self.config.parallel.tensor_parallel
        each = min(self.tokens, chunk_tokens(vocabulary, size))
        alive = 2 if tp > 1 and each < self.tokens else 1
        gathered = self.shard < self.tokens
        chunk = size * each * (alive * (vocabulary + gathered * h) + (tp > 1) * h)
        working = 0.0
        cpu, kernel = self.config.device == "cpu", self.config.kernels.cross_entropy
        if kernel == "torch" or (cpu and kernel == "auto"):
            elements = min(each * vocabulary, max(vocabulary, CHUNK_ELEMENTS["cpu" if cpu else "cuda"]))
            capped = 0 if self.config.model.final_logit_softcapping is None else 2
            working = wide * elements * ((1 if size == wide else 2) + capped)
        return size * self.shard * h + chunk + working

    def _layer_backward(self) -> float:
        """The most of MLP and attention, one after the other."""
        model, split, t, share = self.config.model, self.schedule.split, self.tokens, Share.of(self.config)
        product = t * share.inner
        if model.mlp_gated:
            mlp, saved = (5 if split else 4) * product, 3 * product
        else:
            reads_result = model.hidden_act == "relu"
            mlp, saved = (2 if split or reads_result else 1) * product, (1 if reads_result else 2) * product
        mlp += t * model.hidden_size
        if split and model.parallel_block != "none":
            mlp += t * share.queries * model.head_dim
        if model.attn_logit_softcapping is None or packed_attention(self.config):
            return self.size * mlp
        scores = 2.0 * t * share.queries * self.config.training.sequence_length
        return max(self.size * mlp, self.wide * scores - (0.0 if split else self.size * saved))

    def _messages(self) -> float:
        channels = [ends for ends in self.schedule.channels if self.rank in ends]
        buffers = sum(_RECEIVED_AHEAD if receiver == self.rank else _SENT for _, receiver in channels)
        return buffers * self.shard * self.config.model.hidden_size * self.size

    def _exchange(self) -> float:
        precision, ranks, parallel = self.config.precision, self.ranks, self.config.parallel
        own, largest = sum(self.buckets), max(self.buckets, default=0)
        others = ranks if ranks > 1 else 0
        gathered = 0.0 if parallel.zero_stage else 4.0 * own  # sums, moved out of the way of those of the other ranks
        if precision.gradients == "bfloat16":  # what is received, and the sums; all sums of all ranks with stage 0
            return 4.0 * own + max(2.0 * own * others, gathered * others)
        if precision.gradient_reduction == "bfloat16" and others:  # what is sent, on its way to its place
            return max(2.0 * largest * ranks, gathered)
        return 0.0


def items(memory: RankMemory) -> dict[str, float]:
    """The parts by name, and their peak."""
    return {field.name: getattr(memory, field.name) for field in fields(memory)} | {"peak": memory.total}
