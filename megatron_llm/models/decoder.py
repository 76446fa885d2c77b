"""One pipeline stage of a decoder: embedding (first stage), layers, final norm and head (last stage).

Called by `training/step.py` through the pipeline runtime and by `generation/`. Layer indices are global, so the name of
a weight does not depend on the layout.

Shape suffixes: T tokens of the micro-batch, S tokens of this rank's sequence shard (T / tp), H hidden, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from megatron_llm.config import ModelConfig
from megatron_llm.models.block import DecoderLayer
from megatron_llm.models.context import ForwardContext, KeyValueCache
from megatron_llm.models.norm import hidden_norm
from megatron_llm.models.positions import PositionEmbedding, Rotary
from megatron_llm.models.recompute import Recompute
from megatron_llm.models.regularization import Regularization
from megatron_llm.models.setup import Setup
from megatron_llm.ops.batch import Batch
from megatron_llm.ops.cross_entropy import Penalties
from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.ops.kernels import Kernels
from megatron_llm.parallel.embedding import VocabParallelEmbedding
from megatron_llm.parallel.grid import Axis, Grid
from megatron_llm.parallel.head import Head, linear_objective, linear_scores
from megatron_llm.parallel.linear import ColumnParallelLinear, OutputShard, sharded_bias, sharded_weight
from megatron_llm.parallel.loss import VocabularySlice


class DecoderStage(nn.Module):
    """The layers of one stage.

    Args:
        layers: global indices of the layers held here.
        first, last: whether the embedding, or final norm and head, are here.
        sequence_parallel: what training uses; a call may choose otherwise (generation does).
        kernels: which implementation of each operation runs.
        recompute: what backward makes again instead of keeping it.
    """

    def __init__(
        self,
        model: ModelConfig,
        grid: Grid,
        layers: range,
        *,
        first: bool,
        last: bool,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels = Kernels(),
        recompute: Recompute = Recompute(),
    ):
        super().__init__()
        self.model, self.tp = model, grid.tp
        self.first, self.last, self.indices = first, last, layers
        self.sequence_parallel = sequence_parallel and grid.tp.size > 1
        self.kernels, self.dtype, self.device = kernels, dtype, device
        setup = Setup(model, grid, self.sequence_parallel, dtype, device, kernels)

        tied = model.tie_word_embeddings
        replica = grid.tied if tied and not (first and last) else Axis("none")
        embedding_shard = OutputShard.even("embedding.weight", model.vocab_size, grid.tp, replica)
        if first or (last and tied):
            embedding_weight = sharded_weight(model.hidden_size, [embedding_shard], dtype, device)
        self.position_embedding = self.embedding_norm = self.final_norm = None
        if first:
            self.embedding = VocabParallelEmbedding(embedding_weight, embedding_shard.start, grid.tp, kernels.embedding)
            if model.position_embedding == "learned":
                self.position_embedding = PositionEmbedding(setup)
            if model.embedding_norm:
                self.embedding_norm = hidden_norm("embedding_norm", setup)
        self.layers = nn.ModuleList(DecoderLayer(setup, index, recompute.at(index)) for index in layers)
        if last:
            if model.final_norm:
                self.final_norm = hidden_norm("final_norm", setup)
            self.head_shard = OutputShard.even("head.weight", model.vocab_size, grid.tp)
            head_weight = embedding_weight if tied else sharded_weight(model.hidden_size, [self.head_shard], dtype, device)
            bias = sharded_bias([self.head_shard], dtype, device) if model.head_bias else None
            self.head = ColumnParallelLinear(head_weight, grid.tp, bias)
        self.rotary = Rotary(model, stat_dtype(dtype), device)

    def read_before(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """(index as `before_layer` of `forward` gets it, the parameters that are read from then on)."""
        if self.first:
            parts = (self.embedding, self.position_embedding, self.embedding_norm)
            yield -1, [parameter for part in parts if part is not None for parameter in part.parameters()]
        for index, layer in zip(self.indices, self.layers, strict=True):
            yield index, list(layer.parameters())
        if self.last:
            ends = (self.final_norm, self.head)
            found = [parameter for part in ends if part is not None for parameter in part.parameters()]
            yield self.model.num_hidden_layers, found

    def forward(
        self,
        x: Tensor | None,
        batch: Batch,
        cache: KeyValueCache | None = None,
        sequence_parallel: bool | None = None,
        before_layer: Callable[[int], None] | None = None,
        regularization: Regularization | None = None,
    ) -> Tensor:
        """Hidden states [S, H] (or [T, H] without sequence parallelism) from those of the stage before; None on the first.

        before_layer: called before the weights of a layer are read, with its global index; -1 stands for the embedding,
            the number of layers for final norm and head.
        regularization: that of a training step.
        """
        before = before_layer or _nothing
        if sequence_parallel is None:
            sequence_parallel = self.sequence_parallel
        tables = self.rotary.tables(batch, cache)
        noise = None if regularization is None else regularization.noise(batch, self.tp, sequence_parallel)
        context = ForwardContext(*tables, batch.cu_seqlens, sequence_parallel, cache, noise=noise)
        if self.first:
            before(-1)
            x = self._embed(batch, context)
        assert x is not None
        for index, layer in zip(self.indices, self.layers, strict=True):
            before(index)
            x = layer(x, context)
        if not self.last:
            return x
        before(self.model.num_hidden_layers)
        return x if self.final_norm is None else self.final_norm(x)

    def _embed(self, batch: Batch, context: ForwardContext) -> Tensor:
        """What enters the first layer."""
        x = self.embedding(batch.tokens_T, context.sequence_parallel)
        if self.model.embedding_multiplier != 1.0:
            x = x * self._rounded(self.model.embedding_multiplier)
        if context.noise is not None:
            x = context.noise.disturb(x, batch)
        if self.position_embedding is not None:
            x = x + self.position_embedding(batch.positions_T, context.sequence_parallel)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _rounded(self, number: float) -> float:
        """A factor as the compute dtype has it: Gemma multiplies by sqrt(hidden_size) in the dtype of its activations."""
        return float(torch.tensor(number, dtype=self.dtype))

    def logits(self, hidden: Tensor, sequence_parallel: bool | None = None) -> Tensor:
        """[S or T, H] -> this rank's slice of the logits, [T, V]; columns beyond the true vocabulary are padding.

        In the compute dtype, or float32 where the device computes the product in float32 anyway. For generation: training and
        evaluation never have them all.
        """
        sequence_parallel = self.sequence_parallel if sequence_parallel is None else sequence_parallel
        logits = self.head(self._multiplied(hidden), sequence_parallel, keep_wide=True)
        cap = self.model.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _multiplied(self, hidden: Tensor) -> Tensor:
        """What the head reads. (It has no bias where there is a factor, and hidden states are fewer numbers than logits.)"""
        return hidden if self.model.logit_multiplier == 1.0 else hidden * self.model.logit_multiplier

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Sum over the micro-batch of weight * cross-entropy: a scalar in `stat_dtype`, equal on all tp ranks.

        The sum is not normalized: one over the sum of weights of the *global* batch is applied at the update, so the
        result does not depend on how rows fall into micro-batches and ranks.
        """
        return self.objective(hidden, batch, None)[0]

    def objective(
        self, hidden: Tensor, batch: Batch, regularization: Regularization | None, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(what a training step is to backpropagate, `loss` as a number without gradient).

        scale: a factor on the former. Gradients of the head are made here already, as `parallel/head.py` says.
        """
        penalties = Penalties()
        if regularization is not None:
            penalties = Penalties(self.head_shard.rows, regularization.label_smoothing, regularization.z_loss)
        x = self._multiplied(hidden)
        return linear_objective(x, self._head, batch.labels_T, batch.weights_T, penalties, scale)

    def scores(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, whether the label is the most likely token) of every position, unweighted: [T] in `stat_dtype` and bool [T]."""
        return linear_scores(self._multiplied(hidden), self._head, batch.labels_T)

    @property
    def _head(self) -> Head:
        shard, kernel = self.head_shard, self.kernels.cross_entropy
        vocabulary = VocabularySlice(shard.start, shard.stop, self.tp, self.model.final_logit_softcapping, kernel)
        return Head(self.head.weight, self.head.bias, vocabulary, self.sequence_parallel)


def _nothing(layer: int) -> None:
    """What happens before a layer if nobody asks."""
