"""What a training step does besides following the gradient of the data's loss: `training.regularization`.

Made by `training/step.py` once a step, and handed to the stages (`models/decoder.py`); inference has none.

    dropout         on what a layer adds to the residual stream: outputs of attention and of MLP, or their sum where they are
                    side by side, behind the norms on them. Rates are equal, or rise (LIMA: Zhou et al. 2023, arXiv 2305.11206)
    NEFTune         x + uniform(-1, 1) * alpha / sqrt(L * H) on embedded tokens, multiplied where the model does that, before
                    positions and norms; L tokens of the document, H hidden size (Jain et al. 2023, arXiv 2310.05914)
    objective       label smoothing, and z-loss (Chowdhery et al. 2022, arXiv 2204.02311, 5): `parallel/loss.py`

Random numbers have the address (seed, site, layer; row in the stream, place in the row; channel). No row comes twice in a run,
so a row says the step, too.

Shape suffixes: S tokens of this rank's sequence shard, T of the micro-batch, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from megatron_llm.config import Config
from megatron_llm.ops.batch import Batch
from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.ops.noise import Addresses, dropout, uniform_noise
from megatron_llm.ops.random import stream_key
from megatron_llm.parallel.grid import Axis

Site = Literal["attention", "mlp"]  # of dropout; "mlp" also of the sum of both


@dataclass(frozen=True)
class Regularization:
    """Attributes:
    seed: of the run.
    dropout: rate of each layer of the whole model.
    neftune_noise_alpha, label_smoothing, z_loss: as in the config.
    """

    seed: int
    dropout: tuple[float, ...]
    neftune_noise_alpha: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @classmethod
    def of(cls, config: Config) -> Regularization | None:
        """That of a run's training steps; None if nothing is on."""
        chosen, layers = config.training.regularization, config.model.num_hidden_layers
        rate = chosen.hidden_dropout
        rates = [rate] * layers
        if chosen.hidden_dropout_profile == "rising":
            rates = [rate * layer / max(1, layers - 1) for layer in range(layers)]
        if not (rate or chosen.neftune_noise_alpha or chosen.label_smoothing or chosen.z_loss):
            return None
        return cls(config.training.seed, tuple(rates), chosen.neftune_noise_alpha, chosen.label_smoothing, chosen.z_loss)

    def noise(self, batch: Batch, tp: Axis, sequence_parallel: bool) -> Noise:
        """The random part of it for one forward pass, on the tokens of this rank. The batch knows its rows."""
        tokens = len(batch.tokens_T)
        assert batch.rows and tokens % len(batch.rows) == 0, f"{tokens} tokens of rows {batch.rows}"
        share = tokens // tp.size if sequence_parallel else tokens
        start = tp.rank * share if sequence_parallel else 0
        return Noise(self, Addresses(batch.rows, tokens // len(batch.rows), start, start + share))


@dataclass(frozen=True)
class Noise:
    """Of one forward pass, and of its backward."""

    chosen: Regularization
    addresses: Addresses

    def drop(self, x_SH: Tensor, site: Site, layer: int) -> Tensor:
        """Dropout at one place of a layer, given by its index in the whole model."""
        rate = self.chosen.dropout[layer]
        return dropout(x_SH, rate, stream_key(self.chosen.seed, "dropout", site, layer), self.addresses) if rate else x_SH

    def disturb(self, embedded_SH: Tensor, batch: Batch) -> Tensor:
        """NEFTune."""
        alpha = self.chosen.neftune_noise_alpha
        if not alpha:
            return embedded_SH
        lengths = torch.tensor([stop - start for start, stop in pairwise(batch.cu_seqlens)])
        length_S = lengths.repeat_interleave(lengths)[self.addresses.start : self.addresses.stop]
        most_S = alpha * (length_S * embedded_SH.shape[1]).to(stat_dtype(embedded_SH.dtype)).rsqrt()
        key = stream_key(self.chosen.seed, "neftune")
        most_S = most_S.to(embedded_SH.device, non_blocking=True)
        return embedded_SH + uniform_noise(embedded_SH, most_S, key, self.addresses)
