"""Dropout and uniform noise in which each element is a function of a key, of the address of its token and of its channel.

So it does not matter which rank makes them, in which micro-batch, or how often: layouts, schedules and recomputation do not
change a bit, and backward makes a mask again instead of keeping it. Called by `models/regularization.py`.

A word of 64 random bits (`ops/random.py`) serves four channels of a mask, 16 bits each, or two of uniform noise; words are made
in chunks that stay in cache. A rate of dropout is rounded to a multiple of 2^-16, and what stays is scaled by the rounded one.

Shape suffixes: S tokens of this rank, H channels, C tokens of a chunk, W words of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.ops.random import random_bits

CHUNK_WORDS = {"cpu": 1 << 15, "cuda": 1 << 21}  # three int64 arrays of them: 0.8 MB in L2; 50 MB, a GPU's L2
_CHANNELS, _STEPS = 4, 1 << 16  # of a mask: channels that share a word, steps of a rate


@dataclass(frozen=True)
class Addresses:
    """Where tokens [start, stop) of a micro-batch come from: each has a number of its own in the whole run.

    rows: number of each row of the micro-batch in its stream, where none comes twice; length: tokens of a row.
    """

    rows: tuple[int, ...]
    length: int
    start: int
    stop: int

    def on(self, device: torch.device) -> Tensor:
        """int64 [stop - start]: number of the row * length + place in the row. Made there: nothing is copied from the host."""
        parts = []
        for number, row in enumerate(self.rows):
            first, last = max(self.start - number * self.length, 0), min(self.stop - number * self.length, self.length)
            if first < last:
                parts.append(torch.arange(row * self.length + first, row * self.length + last, device=device))
        return torch.cat(parts)


def dropout(x_SH: Tensor, rate: float, key: int, addresses: Addresses) -> Tensor:
    """Each element is 0 with probability `rate`, and else scaled so that the mean stays; rate in [0, 1). Nothing is kept."""
    dropped = min(round(rate * _STEPS), _STEPS - 1)
    return _Dropout.apply(x_SH, dropped, key, addresses) if dropped else x_SH


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SH: Tensor, dropped: int, key: int, addresses: Addresses) -> Tensor:
        ctx.mask = dropped, key, addresses
        return _masked(x_SH, *ctx.mask)

    @staticmethod
    def backward(ctx: Any, dy_SH: Tensor) -> tuple[Tensor, None, None, None]:
        return _masked(dy_SH, *ctx.mask), None, None, None


def _masked(x_SH: Tensor, dropped: int, key: int, addresses: Addresses) -> Tensor:
    """x * mask / (1 - rate). What is not finite stays so if it is dropped, too: training must hear of it."""
    out_SH = torch.empty_like(x_SH)
    for at, words_CW in _words(key, addresses, x_SH, _CHANNELS):
        kept_CH = words_CW.view(torch.int16)[:, : x_SH.shape[1]] >= dropped - _STEPS // 2
        torch.mul(x_SH[at], kept_CH, out=out_SH[at]).mul_(_STEPS / (_STEPS - dropped))
    return out_SH


def uniform_noise(like_SH: Tensor, most_S: Tensor, key: int, addresses: Addresses) -> Tensor:
    """Numbers from [-most, most) for each token, in the dtype of `like_SH`. most_S: in `stat_dtype`."""
    out_SH = torch.empty_like(like_SH)
    for at, words_CW in _words(key, addresses, like_SH, 2):
        unit_CH = words_CW.view(torch.int32)[:, : like_SH.shape[1]].to(stat_dtype(like_SH.dtype)).mul_(2.0**-31)
        out_SH[at] = unit_CH.mul_(most_S[at, None])
    return out_SH


def _words(key: int, addresses: Addresses, like_SH: Tensor, channels: int) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, int64 words [C, W] that hold something for each channel) by chunks."""
    tokens, width = like_SH.shape[0], -(-like_SH.shape[1] // channels)
    address_S, word_W = addresses.on(like_SH.device), torch.arange(width, device=like_SH.device)
    step = max(1, CHUNK_WORDS[like_SH.device.type] // width)
    for start in range(0, tokens, step):
        at = slice(start, start + step)
        yield at, random_bits(key, address_S[at, None] * width + word_W)
