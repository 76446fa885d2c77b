"""Where a token stands in its document, as the model is told: rotary tables for the layers, or a learned embedding.

(ALiBi is a matter of the scores: `ops/attention.py`.) Called by `models/decoder.py`.

Shape suffixes: T tokens, S tokens of this rank's sequence shard, P rotated pairs, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from megatron_llm.config import ModelConfig
from megatron_llm.models.context import KeyValueCache
from megatron_llm.models.setup import Setup
from megatron_llm.ops.batch import Batch
from megatron_llm.ops.rope import rope_frequencies, rope_tables
from megatron_llm.parallel.embedding import lookup
from megatron_llm.parallel.linear import replicated

Tables = tuple[Tensor, Tensor]


class Rotary:
    """The rotary tables of a model's layers.

    Scalings that go by the length of a document choose the frequencies of each by its own, so packing changes nothing.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device: torch.device):
        self.model, self.dtype, self.device = model, dtype, device
        self.used = model.position_embedding == "rope"
        scaling = model.rope_scaling
        self.factor = 1.0 if scaling is None else scaling.attention_factor or 1.0
        if self.used:
            self.frequencies_P = self._frequencies(0)
            local = model.rope_local_theta
            self.local_P = rope_frequencies(model.rotary_dim, local, None, dtype).to(device) if local else None

    def _frequencies(self, length: int) -> Tensor:
        model = self.model
        made = rope_frequencies(model.rotary_dim, model.rope_theta, model.rope_scaling, self.dtype, length)
        return made.to(self.device, non_blocking=True)  # documents of new lengths must not make the host wait

    def length_class(self, length: int) -> int:
        """Documents with the same number have the same frequencies: the length that counts for them."""
        scaling = self.model.rope_scaling
        if not self.used or scaling is None or not scaling.by_length or length <= scaling.original_max_position_embeddings:
            return 0
        return length if scaling.rope_type == "dynamic" else scaling.original_max_position_embeddings + 1

    def tables(self, batch: Batch, cache: KeyValueCache | None) -> tuple[Tables | None, Tables | None]:
        """(of layers without a sliding window, of those with one) for the tokens of a batch."""
        if not self.used:
            return None, None
        lengths = [stop - start for start, stop in pairwise(batch.cu_seqlens)]
        rope = rope_tables(batch.positions_T, self._of_documents(lengths, cache), self.factor)
        return rope, rope if self.local_P is None else rope_tables(batch.positions_T, self.local_P)

    def _of_documents(self, lengths: Sequence[int], cache: KeyValueCache | None) -> Tensor:
        """[P] if all documents have the same frequencies, else [T, P]."""
        classes = [self.length_class(length) for length in (lengths if cache is None else cache.lengths)]
        if not any(classes):
            return self.frequencies_P
        found = {number: self._frequencies(number) for number in set(classes)}
        if len(found) == 1:
            return next(iter(found.values()))
        rows = torch.stack([found[number] for number in classes])
        return rows.repeat_interleave(torch.tensor(lengths).to(self.device, non_blocking=True), dim=0, output_size=sum(lengths))


class PositionEmbedding(nn.Module):
    """Positions [T] -> [T, H], or this rank's [S, H] when sequence parallel: learned, on every rank of tp.

    The table has `position_offset` rows before that of position 0 (OPT has 2).
    """

    def __init__(self, setup: Setup):
        super().__init__()
        model, tp = setup.model, setup.tp
        self.tp, self.offset, self.kernel = tp, model.position_offset, setup.kernels.embedding
        shape = (model.max_position_embeddings + model.position_offset, model.hidden_size)
        self.weight = replicated(
            "position_embedding.weight", shape, "normal", tp, setup.partial, setup.dtype, setup.device, decay=True
        )

    def forward(self, positions_T: Tensor, sequence_parallel: bool) -> Tensor:
        rows = positions_T + self.offset
        if sequence_parallel and self.tp.size > 1:
            rows = rows.chunk(self.tp.size)[self.tp.rank]
        return lookup(rows, self.weight, self.kernel)
