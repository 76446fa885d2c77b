"""FlashAttention-2 (Dao 2023) over packed documents, forward and backward. Called by `ops/attention.py`, which has the reference.

    O = softmax(x) V, x = bias + cap tanh(scale Q K^T / cap), of the keys that each query sees; backward: `attention_kernels.py`

FLOPs: 4 N D times the visible pairs of query and key forward, at least 2.5 times as many backward; here 3.5 times, because dQ
has a kernel of its own, which makes scores and dP again: without atomics, so that every gradient is the same bits each time.
Bytes: Q, K, V, O once, 2 (N + K) D of 2 bytes a token, and K, V again for each tile of queries, mostly from L2; far below what
the FLOPs take. Kept for backward: the arguments, O, and 4 bytes a query and head.

A head dimension that is no power of two is padded to one within the kernels (80 and 96: to 128, with as many FLOPs).

Which tiles there are is known on the host, so no program looks for its document and none is launched for nothing (`tiles`).

Shape suffixes: T query tokens, S key tokens, N query heads, K key/value heads (N a multiple of K), D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from megatron_llm.ops.triton import cdiv
from megatron_llm.ops.triton.attention_kernels import delta_kernel, dkdv_kernel, dq_kernel, forward_kernel

LOG2_E = math.log2(math.e)
MAX_HEAD_DIM = 256
DELTA_ROWS = 32  # tokens of a program of delta_kernel: at most 32 x 256 elements


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched. rows: of its tiles (queries; for dkdv keys). block: of the other side in one step of its loop.
    apart: dk and dv in a launch each, as their sums do not fit in registers together: a matrix product in four is made twice.
    """

    rows: int
    block: int
    warps: int
    stages: int
    apart: bool = False


_LAUNCHES: dict[int, dict[str, dict[int, tuple[Launch, Launch]]]] = {
    80: {
        "forward": {
            64: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
            128: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
            256: (Launch(64, 32, 8, 2), Launch(64, 32, 8, 2)),
        },
        "dkdv": {
            64: (Launch(64, 32, 4, 2), Launch(64, 32, 4, 2)),
            128: (Launch(64, 32, 8, 2), Launch(64, 32, 8, 2)),
            256: (Launch(32, 16, 8, 1), Launch(32, 16, 8, 1)),
        },
        "dq": {
            64: (Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)),
            128: (Launch(64, 32, 4, 2), Launch(64, 32, 4, 2)),
            256: (Launch(64, 16, 8, 1), Launch(64, 16, 8, 1)),
        },
    },
    90: {
        "forward": {
            64: (Launch(128, 128, 8, 3), Launch(128, 128, 8, 3)),
            128: (Launch(128, 128, 8, 2), Launch(128, 64, 8, 2)),
            256: (Launch(128, 32, 8, 2), Launch(128, 32, 8, 2)),
        },
        "dkdv": {
            64: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
            128: (Launch(128, 32, 8, 2), Launch(128, 32, 8, 2)),
            256: (Launch(128, 32, 8, 2, True), Launch(128, 32, 8, 2, True)),
        },
        "dq": {
            64: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
            128: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
            256: (Launch(128, 32, 8, 2), Launch(128, 32, 8, 2)),
        },
    },
    100: {
        "forward": {
            64: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
            128: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
            256: (Launch(128, 32, 8, 2), Launch(128, 32, 8, 2)),
        },
        "dkdv": {
            64: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
            128: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
            256: (Launch(64, 32, 8, 2), Launch(64, 32, 8, 2)),
        },
        "dq": {
            64: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
            128: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
            256: (Launch(64, 64, 8, 1), Launch(64, 64, 8, 1)),
        },
    },
}
"""By architecture, direction and padded head dimension (smaller ones: 64): without and with a window, a soft cap or ALiBi, which
take registers. Chosen so that no register spills."""


def launch(direction: str, arch: int, head_dim: int, itemsize: int = 2, extras: bool = False) -> Launch:
    """The block sizes of "forward", "dkdv" or "dq" for an `architecture` and the bytes of a number.

    extras: whether there is a window, a soft cap or ALiBi. Rows depend on direction, architecture and head dimension only,
    because `tiles` knows nothing else. Architectures between those of the table get small blocks, as they have half the shared
    memory; float32, for tests, steps of 16.
    """
    padded = max(64, triton.next_power_of_2(head_dim))
    if arch in (86, 87, 89, 120, 121):
        rows = 64 if padded < 256 or direction == "dq" else 32
        return Launch(rows, 16, 4 if padded < 256 else 8, 1)
    table = _LAUNCHES[80 if arch < 90 else 90 if arch < 100 else 100]
    filled = 64 < head_dim < padded  # masks of the padding take registers too
    chosen = table[direction][padded][extras or filled]
    if filled and direction == "dq":
        chosen = replace(chosen, block=chosen.block // 2)
    return Launch(chosen.rows, 16, chosen.warps, 1, chosen.apart) if itemsize == 4 else chosen


def architecture(device: torch.device) -> int:
    """The compute capability in tens, 90 for a Hopper; what the interpreter runs is a Hopper's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class Tiles:
    """The tiles of each kernel on the device, int32 [tiles, 5] (see `attention_kernels.py`), those with the most work first, so
    that the last programs to run are short ones, whatever the documents are.
    """

    forward: Tensor
    dkdv: Tensor
    dq: Tensor


def tiles(cu_q: Sequence[int], cu_k: Sequence[int], head_dim: int, window: int | None, device: torch.device) -> Tiles:
    """Those of documents with queries cu_q[i]:cu_q[i+1] and keys cu_k[i]:cu_k[i+1], the same for all heads. Every token of T
    and S is in a document. Nothing waits for the device.
    """
    arch = architecture(device)
    rows = [launch(direction, arch, head_dim).rows for direction in ("forward", "dkdv", "dq")]
    bounds_q, bounds_k = np.asarray(cu_q, np.int64), np.asarray(cu_k, np.int64)
    lists = [_tiles(bounds_q, bounds_k, rows[0], window, False), _tiles(bounds_q, bounds_k, rows[1], window, True)]
    if rows[2] != rows[0]:
        lists.append(_tiles(bounds_q, bounds_k, rows[2], window, False))
    together = torch.from_numpy(np.concatenate(lists))
    if device.type == "cuda":
        together = together.pin_memory().to(device, non_blocking=True)
    forward, dkdv, *dq = together.split([len(part) for part in lists])
    return Tiles(forward, dkdv, dq[0] if dq else forward)


def _tiles(cu_q: np.ndarray, cu_k: np.ndarray, rows: int, window: int | None, of_keys: bool) -> np.ndarray:
    q_len, k_len = np.diff(cu_q), np.diff(cu_k)
    lengths = k_len if of_keys else q_len
    blocks = -(-lengths // rows)
    document = np.repeat(np.arange(len(blocks)), blocks)
    row = (np.arange(len(document)) - (np.cumsum(blocks) - blocks)[document]) * rows
    last = np.minimum(row + rows, lengths[document])
    shift = (k_len - q_len)[document]
    reach = np.iinfo(np.int32).max if window is None else window
    if of_keys:  # queries first:end see some of them
        first, end = np.maximum(row - shift, 0), np.minimum(last - 1 - shift + reach, q_len[document])
    else:  # they see keys first:end
        first, end = np.maximum(row + shift - reach + 1, 0), last + shift
    table = np.stack([cu_q[document], q_len[document], cu_k[document], k_len[document], row], axis=1)
    return table[np.argsort(-np.maximum(end - first, 0), kind="stable")].astype(np.int32)


def flash_attention(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    tiles: Tiles,
    scale: float,
    softcap: float | None,
    slopes_N: Tensor | None,
    coarse: bool,
    window: int | None,
) -> Tensor:
    """[T, N, D], [S, K, D], [S, K, D] -> [T, N, D], contiguous; differentiable in q, k and v.

    The rest has the meaning of `ops.attention.Scores`; scale > 0; window as it was given to `tiles`. D: at most MAX_HEAD_DIM.
    Any strides with a contiguous last dim. A query that sees no key gets zeros.
    """
    work = tiles.forward, tiles.dkdv, tiles.dq
    return _forward(q_TND, k_SKD, v_SKD, *work, slopes_N, scale, softcap, coarse, window)[0]


def _settings(
    q: Tensor, k: Tensor, slopes: Tensor | None, scale: float, softcap: float | None, window: int | None
) -> dict[str, Any]:
    """The arguments that the three kernels share."""
    head_dim = q.shape[2]
    cap = 1.0 if softcap is None else softcap
    return {
        "SLOPES": slopes,
        "T": q.shape[0],
        "scale_log2": scale * LOG2_E,
        "cap_scale": 2.0 * scale * LOG2_E / cap,
        "cap_log2": cap * LOG2_E,
        "window": 0 if window is None else window,
        "heads": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": head_dim,
        "DP": max(16, triton.next_power_of_2(head_dim)),
        "CAP": softcap is not None,
        "WINDOW": window is not None,
    }


def _extras(slopes: Tensor | None, softcap: float | None, window: int | None) -> bool:
    return slopes is not None or softcap is not None or window is not None


def _options(direction: str, q: Tensor, extras: bool) -> dict[str, int]:
    chosen = launch(direction, architecture(q.device), q.shape[2], q.element_size(), extras)
    m, n = (chosen.block, chosen.rows) if direction == "dkdv" else (chosen.rows, chosen.block)
    options = {"M": m, "N": n, "num_warps": chosen.warps, "num_stages": chosen.stages}
    return options | ({"apart": chosen.apart} if direction == "dkdv" else {})


@torch.library.custom_op("megatron_llm::flash_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor, dkdv: Tensor, dq: Tensor, slopes: Tensor | None,
    scale: float, softcap: float | None, coarse: bool, window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [T, N, D], log2 of the sums of exponentials [N, T]). dkdv, dq: tiles that backward will need."""
    o, lse = _fake_forward(q, k, v, forward, dkdv, dq, slopes, scale, softcap, coarse, window)
    if forward.shape[0]:
        options = _options("forward", q, _extras(slopes, softcap, window))
        forward_kernel[(forward.shape[0] * q.shape[1],)](
            q, k, v, o, lse, forward,
            q_stride=q.stride(0), q_head=q.stride(1), k_stride=k.stride(0), k_head=k.stride(1),
            v_stride=v.stride(0), v_head=v.stride(1), COARSE=coarse,
            **_settings(q, k, slopes, scale, softcap, window), **options,
        )  # fmt: skip
    return o, lse


@_forward.register_fake
def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor, dkdv: Tensor, dq: Tensor, slopes: Tensor | None,
    scale: float, softcap: float | None, coarse: bool, window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("megatron_llm::flash_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dkdv: Tensor, dq: Tensor, slopes: Tensor | None,
    scale: float, softcap: float | None, coarse: bool, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, contiguous. do: [T, N, D] with a contiguous last dim."""
    gradients = _fake_backward(do, q, k, v, o, lse, dkdv, dq, slopes, scale, softcap, coarse, window)
    tokens, heads, head_dim = q.shape
    extras = _extras(slopes, softcap, window)
    shared = _settings(q, k, slopes, scale, softcap, window) | {
        "scale": scale, "COARSE": coarse,
        "q_stride": q.stride(0), "q_head": q.stride(1), "k_stride": k.stride(0), "k_head": k.stride(1),
        "v_stride": v.stride(0), "v_head": v.stride(1), "do_stride": do.stride(0), "do_head": do.stride(1),
    }  # fmt: skip
    delta = torch.empty_like(lse)
    if tokens:
        grid = (cdiv(tokens, DELTA_ROWS), heads)
        delta_kernel[grid](
            do, o, delta, do.stride(0), do.stride(1), tokens, heads, head_dim, shared["DP"], DELTA_ROWS, num_warps=4
        )
    if dkdv.shape[0]:
        options = _options("dkdv", q, extras)
        apart = options.pop("apart")
        parts = [(gradients[1], None), (None, gradients[2])] if apart else [gradients[1:]]
        for dk, dv in parts:
            dkdv_kernel[(dkdv.shape[0] * k.shape[1],)](q, k, v, do, lse, delta, dk, dv, dkdv, **shared, **options)
    if dq.shape[0]:
        options = _options("dq", q, extras)
        dq_kernel[(dq.shape[0] * heads,)](q, k, v, do, lse, delta, gradients[0], dq, **shared, **options)
    return gradients


@_backward.register_fake
def _fake_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dkdv: Tensor, dq: Tensor, slopes: Tensor | None,
    scale: float, softcap: float | None, coarse: bool, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, dkdv, dq, slopes, *ctx.scores = inputs
    ctx.save_for_backward(q, k, v, *output, dkdv, dq, slopes)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 11
    q, k, v, o, lse, dkdv, dq, slopes = ctx.saved_tensors
    do = do if do.stride(-1) == 1 else do.contiguous()
    return *_backward(do, q, k, v, o, lse, dkdv, dq, slopes, *ctx.scores), *(None,) * 8


_forward.register_autograd(_differentiate, setup_context=_save)
