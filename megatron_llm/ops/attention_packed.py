"""Attention by kernels that take packed documents with their boundaries: one call for all of them, and no matrices in memory.

Called by `ops/attention.py`, which says what the arguments are, and which case runs on which. Saved for backward: q, k, v, the
output and 4 bytes for a token and query head.

Libraries are imported when they are to run, and called by name of the argument, as they are in flash-attn 2.8, flash-attn-3 (the
folder `hopper` of flash-attn), flash-attn-4 4.0, and torch 2.11 to 2.13. All of them align the causal mask to the last query and
key, take fewer heads of keys than of queries, and count a window by the keys *before* a query.

Shape suffixes: T query tokens, S key tokens, N query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_llm.ops.scores import Scores, Terms


class Library(NamedTuple):
    """A function of a package that may not be there.

    Attributes:
        needs: arguments that it has by name; a version without one of them is too old.
        install: how it comes here.
    """

    module: str
    function: str
    needs: tuple[str, ...]
    install: str

    def load(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(import_module(self.module), self.function)
        return function

    def problem(self) -> str | None:
        """Why it cannot be called; None if it can. The package is imported."""
        try:
            function = self.load()
        except ModuleNotFoundError as error:
            if error.name is not None and self.module.startswith(error.name):
                return f"{self.module} is not installed ({self.install})"
            return f"{self.module} cannot be imported: {error}"
        except Exception as error:  # a package for another torch or CUDA fails in its own ways, and must not end the run
            return f"{self.module} cannot be imported: {type(error).__name__}: {error}"
        lacking = ", ".join(name for name in self.needs if name not in inspect.signature(function).parameters)
        return f"{self.module}.{self.function} has no {lacking}: another version is needed ({self.install})" if lacking else None


_FLASH = (
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "window_size", "softcap"),
    "deterministic",
)
LIBRARIES = {
    "flash4": Library("flash_attn.cute", "flash_attn_varlen_func", _FLASH, "pip install flash-attn-4"),
    "flash3": Library("flash_attn_interface", "flash_attn_varlen_func", _FLASH, "built from flash-attention's folder hopper"),
    "flash2": Library("flash_attn", "flash_attn_varlen_func", (*_FLASH, "alibi_slopes"), "pip install flash-attn"),
    "varlen": Library("torch.nn.attention.varlen", "varlen_attn", ("scale", "window_size"), "torch 2.11 or later"),
}


class Boundaries(NamedTuple):
    """Of documents as libraries take them: int32 on the device, and the lengths of the longest."""

    cu_q: Tensor
    cu_k: Tensor
    most_q: int
    most_k: int


def boundaries(terms: Terms, device: torch.device) -> Boundaries:
    """Without documents that have no token; sent to the device once a pass, and nothing is waited for."""
    key = ("boundaries", tuple(terms.cu_q), tuple(terms.cu_k))
    if key not in terms.shared:
        ends = list(zip(terms.cu_q, terms.cu_k, strict=True))
        ends = [ends[0], *(end for before, end in pairwise(ends) if end != before)]
        sides = list(zip(*ends, strict=True))
        most_q, most_k = (max(stop - start for start, stop in pairwise(side)) for side in sides)
        sent = {side: torch.tensor(side, dtype=torch.int32).to(device, non_blocking=True) for side in sides}
        terms.shared[key] = Boundaries(sent[sides[0]], sent[sides[1]], most_q, most_k)
    found: Boundaries = terms.shared[key]
    return found


def varlen(q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, terms: Terms) -> Tensor:
    found = boundaries(terms, q_TND.device)
    attend = LIBRARIES["varlen"].load()
    # Before it was an argument, fewer heads of keys were taken without a word.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(attend).parameters else {}
    before = _before(terms.scores, found)
    scale, window = terms.scores.factor(q_TND.shape[-1]), (-1 if before is None else before, 0)
    out: Tensor = attend(*map(_rows, (q_TND, k_SKD, v_SKD)), *found, scale=scale, window_size=window, **grouped)
    return out


def flash2(q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, terms: Terms) -> Tensor:
    return _flash("flash2", -1, q_TND, k_SKD, v_SKD, terms, alibi_slopes=terms.scores.slopes_N)


def flash3(q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, terms: Terms) -> Tensor:
    return _flash("flash3", -1, q_TND, k_SKD, v_SKD, terms)


def flash4(q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, terms: Terms) -> Tensor:
    return _flash("flash4", None, q_TND, k_SKD, v_SKD, terms)


def _flash(name: str, unlimited: int | None, q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, terms: Terms, **more: Any) -> Tensor:
    """What the packages have in common. unlimited: how this one writes a window without an end."""
    found, scores = boundaries(terms, q_TND.device), terms.scores
    before = _before(scores, found)
    result = LIBRARIES[name].load()(
        *map(_rows, (q_TND, k_SKD, v_SKD)),
        cu_seqlens_q=found.cu_q,
        cu_seqlens_k=found.cu_k,
        max_seqlen_q=found.most_q,
        max_seqlen_k=found.most_k,
        softmax_scale=scores.factor(q_TND.shape[-1]),
        causal=True,
        window_size=(unlimited if before is None else before, 0),
        softcap=scores.softcap or 0.0,
        deterministic=terms.deterministic,
        **more,
    )
    out: Tensor = result[0] if isinstance(result, tuple) else result  # versions differ in whether they add the log-sum-exp
    return out


def triton(q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, terms: Terms) -> Tensor:
    from megatron_llm.ops.triton.attention import flash_attention, tiles

    scores, head_dim = terms.scores, q_TND.shape[-1]
    key = ("tiles", tuple(terms.cu_q), tuple(terms.cu_k), head_dim, scores.window)
    if key not in terms.shared:
        terms.shared[key] = tiles(terms.cu_q, terms.cu_k, head_dim, scores.window, q_TND.device)
    q_TND, k_SKD, v_SKD = map(_rows, (q_TND, k_SKD, v_SKD))
    factor, found = scores.factor(head_dim), terms.shared[key]
    out: Tensor = flash_attention(
        q_TND, k_SKD, v_SKD, found, factor, scores.softcap, scores.slopes_N, scores.coarse, scores.window
    )
    return out


def _before(scores: Scores, found: Boundaries) -> int | None:
    """How many keys before its own a query sees; None: all."""
    return None if scores.window is None or scores.window >= found.most_k else scores.window - 1


def _rows(x: Tensor) -> Tensor:
    """With a contiguous last dim; q, k and v may lie side by side, and are not copied apart."""
    return x if x.stride(-1) == 1 else x.contiguous()
