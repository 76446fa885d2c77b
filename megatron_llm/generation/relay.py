"""A model whose stages are spread over the ranks of a grid, as one function from new tokens to the logits after them.

The schedules of `pipeline/` send micro-batches of one static shape, many at a time. Here every pass has another number of
tokens and waits for the one before, so stages run one after the other, each with a cache of its own layers, and hidden states
go from owner to owner. Weights are the stages' own: this runs in the middle of a training run, in any of its layouts. All
replicas of data parallelism do the same. Called by `generate.py`.

Shape suffixes: T new tokens of all sequences, B sequences, H hidden, V vocabulary, L the rank's padded part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.config import ModelConfig
from megatron_llm.generation.cache import SequenceCache
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.models.positions import Rotary
from megatron_llm.ops.batch import Batch
from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.parallel.collectives import all_gather, broadcast
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.messages import axis_of_channel


@dataclass(frozen=True)
class Relay:
    """Attributes:
    grid: where the stages are.
    stages: this rank's, by their number in the order of the model.
    placement: the pipeline rank of every stage.
    """

    grid: Grid
    stages: Mapping[int, DecoderStage]
    placement: tuple[int, ...]

    @classmethod
    def whole(cls, stage: DecoderStage) -> Relay:
        """A model that one process holds."""
        assert stage.first and stage.last and stage.tp.size == 1
        return cls(Grid.single(), {0: stage}, (0,))

    @property
    def model(self) -> ModelConfig:
        return self._any_stage.model

    @property
    def rotary(self) -> Rotary:
        return self._any_stage.rotary

    @property
    def _any_stage(self) -> DecoderStage:
        return next(iter(self.stages.values()))

    def logits(self, feed: Sequence[Sequence[int]], cache: SequenceCache) -> Tensor | None:
        """Logits after the last fed token of each sequence, [B, V] in `stat_dtype`, on the ranks of the last stage. Collective.

        feed: new tokens of each sequence, the same on all ranks.
        """
        device, me = self._any_stage.device, self.grid.pp.rank
        positions_T = cache.begin([len(tokens) for tokens in feed])
        tokens_T = torch.tensor([token for tokens in feed for token in tokens])
        batch = Batch(tokens_T, tokens_T, torch.zeros(len(tokens_T)), positions_T, cache.cu_seqlens).to(device)
        x: Tensor | None = None
        for number, owner in enumerate(self.placement):
            if owner != me:
                continue
            if number and self.placement[number - 1] != me:
                x = self._receive(self.placement[number - 1], len(tokens_T))
            x = self.stages[number](x, batch, cache=cache, sequence_parallel=False)
            assert x is not None
            if number + 1 < len(self.placement) and self.placement[number + 1] != me:
                self._send(self.placement[number + 1], x)
        if self.placement[-1] != me:
            return None
        assert x is not None
        last_B = torch.tensor(cache.cu_seqlens[1:], device=device) - 1
        logits_BL = self.stages[len(self.placement) - 1].logits(x[last_B], sequence_parallel=False)
        logits_VB = all_gather(logits_BL.t().contiguous(), self.grid.tp)[: self.model.vocab_size]
        return logits_VB.t().to(stat_dtype(logits_VB.dtype))

    def _send(self, receiver: int, x_TH: Tensor) -> None:
        axis = axis_of_channel(self.grid, self.grid.pp.rank, receiver)
        axis.traffic.add("message", x_TH)
        dist.send(x_TH.contiguous(), axis.ranks[receiver], group=axis.group)

    def _receive(self, sender: int, tokens: int) -> Tensor:
        axis, stage = axis_of_channel(self.grid, sender, self.grid.pp.rank), self._any_stage
        x_TH = torch.empty(tokens, stage.model.hidden_size, dtype=stage.dtype, device=stage.device)
        dist.recv(x_TH, axis.ranks[sender], group=axis.group)
        return x_TH

    @property
    def chooses(self) -> bool:
        """Whether this rank chooses tokens for its model replica: the first tensor-parallel rank of the last stage.

        One, as ranks that compute the same on a GPU need not get the same last bits.
        """
        return self.placement[-1] == self.grid.pp.rank and self.grid.tp.first

    def share(self, chosen_B: Tensor | None, count: int) -> list[int]:
        """The `count` token ids of the rank that chooses, on all ranks of the model replica. Collective."""
        device = self._any_stage.device
        ids_B = torch.zeros(count, dtype=torch.int64, device=device) if chosen_B is None else chosen_B
        if self.placement[-1] == self.grid.pp.rank:
            broadcast(ids_B, self.grid.tp, 0)
        return broadcast(ids_B, self.grid.pp, self.placement[-1]).tolist()
