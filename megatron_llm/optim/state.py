"""What an optimizer keeps for a bucket, masters, moments and averaged weights, and its update. Called by `optim/zero1.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_llm.config import OptimizerConfig
from megatron_llm.ops.adamw import adamw_
from megatron_llm.ops.lion import lion_
from megatron_llm.ops.random import stream_key
from megatron_llm.ops.rounding import StochasticRounding
from megatron_llm.ops.sgd import sgd_
from megatron_llm.optim.buffers import Bucket
from megatron_llm.optim.rules import MOMENTS, Rule, rule_for
from megatron_llm.parallel.shard import Piece


class State:
    """Elements [lo, hi) of a bucket: the slice that this rank owns, or all of it.

    Args:
        whole: keep all of the bucket. Ranks with the same bucket then compute the same.
        kernel: that updates, "torch" or "triton".
    """

    def __init__(self, bucket: Bucket, config: OptimizerConfig, whole: bool, kernel: str = "torch"):
        self.bucket, self.config, self._kernel = bucket, config, kernel
        self.lo, self.hi = (0, bucket.data.numel()) if whole else (bucket.lo, bucket.hi)
        self._weights = bucket.data[self.lo : self.hi]
        self._separate_master = self._weights.dtype is not bucket.wide
        master = self._weights.to(bucket.wide, copy=True) if self._separate_master else self._weights
        narrow = config.state_dtype == "bfloat16" and bucket.wide is torch.float32
        moments = {kind: torch.zeros_like(master, dtype=torch.bfloat16 if narrow else None) for kind in MOMENTS[config.name]}
        self._kept = {"weights": master, **moments}
        if config.ema_decay:
            self._kept["ema"] = master.clone()
        self._runs = _runs(bucket, self.lo, self.hi, config)
        self._narrow = narrow

    def pieces(self, kind: str, lo: int, hi: int) -> Iterator[tuple[Piece, Tensor]]:
        """Every rectangle of a logical tensor in elements [lo, hi) of the bucket, as a view of a kind of state."""
        kept = self._kept[kind][lo - self.lo : hi - self.lo]
        for piece, a, b in self.bucket.pieces(lo, hi):
            yield piece, piece.view(kept[a:b])

    def begin_with_weights(self) -> None:
        """Make compute weights of new masters, of which the average is the first term."""
        if "ema" in self._kept:
            self._kept["ema"].copy_(self._kept["weights"])
        if self._separate_master:
            self._weights.copy_(self._kept["weights"])

    def update(self, gradient: Tensor, number: int, lr: float, scale: float) -> None:
        """Update `number` with gradients [hi - lo], which are multiplied by `scale` and used up."""
        # Replicas have the same bucket and so round alike, wherever their slices are cut.
        key = stream_key("moments", self.bucket.spans[0].spec.parts[0].name, number)
        for a, b, rule in self._runs:
            rounding = StochasticRounding(key, self.lo + a) if self._narrow else None
            self._update_run(slice(a, b), rule, gradient[a:b], number, lr * rule.lr_scale, scale, rounding)
        if self.config.ema_decay:
            self._kept["ema"].lerp_(self._kept["weights"], 1.0 - self.config.ema_decay)

    def _update_run(
        self, run: slice, rule: Rule, gradient: Tensor, number: int, lr: float, scale: float, rounding: StochasticRounding | None
    ) -> None:
        config = self.config
        weights, *moments = (self._kept[kind][run] for kind in ("weights", *MOMENTS[config.name]))
        out = self._weights[run] if self._separate_master else None
        common: dict[str, Any] = {"out": out, "scale": scale, "lr": lr, "weight_decay": rule.weight_decay}
        common |= {"rounding": rounding, "kernel": self._kernel}
        if config.name == "adamw":
            adamw_(weights, gradient, *moments, update=number, betas=config.betas, eps=config.eps, **common)
        elif config.name == "lion":
            lion_(weights, gradient, *moments, betas=config.betas, **common)
        else:
            sgd_(weights, gradient, *moments, momentum=config.momentum, **common)


def _runs(bucket: Bucket, lo: int, hi: int, config: OptimizerConfig) -> list[tuple[int, int, Rule]]:
    """(a, b, rule): elements [a, b) of [lo, hi) with one rule. Padding inside a run is zero and stays so; else it is left out."""
    runs: list[tuple[int, int, Rule]] = []
    for span, part, a, b in bucket.parts(lo, hi):
        rule = rule_for(part.name, span.spec.decay, config)
        if runs and runs[-1][2] == rule:
            runs[-1] = (runs[-1][0], b, rule)
        else:
            runs.append((a, b, rule))
    return runs
