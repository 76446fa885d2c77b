"""Causal attention of packed documents, 16,384 tokens: of equal length, and of many; 32 heads of queries on 8 of keys.

Beside ours every backend of `ops/attention.py` that is here, and FlexAttention; `auto` is what a model would take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Case, Cases, Compared, Run, Setting, gradient

TOKENS = 16384
PACKED = (5, 4000, 1, 130, 2511, 777, 64, 3000, 900, 33, 1500, 2, 1200, 450, 811, 1000)
CHECKED = 2048  # tokens of the longest document that is computed in float64
BACKENDS = ("flash4", "flash3", "flash2", "varlen", "cudnn", "sdpa")


def _scores(setting: Setting, extras: Sequence[str], heads: int) -> Any:
    """`Scores` with the features that a case has."""
    from megatron_llm.ops.scores import Scores, alibi_slopes

    return Scores(
        softcap=50.0 if "softcap" in extras else None,
        slopes_N=torch.tensor(alibi_slopes(heads), device=setting.device) if "ALiBi" in extras else None,
        window=setting.size(1024, 9) if "window" in extras else None,
    )


def _pairs(lengths: Sequence[int], window: int | None) -> int:
    """Queries and keys that see each other."""
    reach = [length if window is None else min(window, length) for length in lengths]
    return sum(w * length - w * (w - 1) // 2 for w, length in zip(reach, lengths, strict=True))


def _exact(q: Tensor, k: Tensor, v: Tensor, cu: Sequence[int], scores: Any) -> Tensor:
    """Of the first head of keys and its queries, [T, N / K, D], [T, D], [T, D]: explicit matrices in float64."""
    outputs = []
    for start, stop in pairwise(cu):
        n = stop - start
        s = torch.einsum("tnd,sd->nts", q[start:stop], k[start:stop]) * q.shape[-1] ** -0.5
        if scores.softcap is not None:
            s = scores.softcap * torch.tanh(s / scores.softcap)
        distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        if scores.slopes_N is not None:
            s = s - scores.slopes_N[: s.shape[0], None, None].double() * distance
        hidden = distance < 0 if scores.window is None else (distance < 0) | (distance >= scores.window)
        outputs.append(torch.einsum("nts,sd->tnd", s.masked_fill(hidden, -torch.inf).softmax(-1), v[start:stop]))
    return torch.cat(outputs)


def _flex(setting: Setting, cu: Sequence[int]) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = cu[-1]
    document = torch.repeat_interleave(torch.arange(len(cu) - 1), torch.tensor(cu).diff()).to(setting.device)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (document[i] == document[j])

    torch._dynamo.reset()
    mask = create_block_mask(seen, None, None, tokens, tokens, device=setting.device, _compile=True)
    attend = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return run


def _case(setting: Setting, lengths: Sequence[int], dim: int, extras: Sequence[str], backward: bool) -> Case:
    from megatron_llm.ops.attention import Available, attention, choose
    from megatron_llm.ops.attention import Case as Asked

    lengths = lengths if not setting.smoke else [min(7, length) for length in lengths[:3]]
    heads, keys, dim = setting.size(32, 4), setting.size(8, 2), setting.size(dim, 16)
    cu, scores = [0, *accumulate(lengths)], _scores(setting, extras, heads)
    deterministic = "deterministic" in extras

    def operands(tokens: int) -> list[Tensor]:
        return [setting.randn(tokens, n, dim, grad=True) for n in (heads, keys, keys)]

    q, k, v = operands(cu[-1])
    do = setting.randn(cu[-1], heads, dim)

    def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, cu: Sequence[int] = cu, shared: Any = None) -> Tensor:
        return attention(q, k, v, cu, cu, backend, scores, shared, deterministic)

    def timed(function: Run) -> Run:
        return gradient(function(q, k, v), [q, k, v], do) if backward else partial(_forward, function, q, k, v)

    def of_backend(name: str) -> Run:
        from megatron_llm.ops.attention import assert_supported

        assert_supported(name, asked, available)
        return timed(partial(attend, name, shared={}))

    def check() -> Iterator[Compared]:
        few = [min(length, CHECKED) for length in lengths]
        few = few[: 1 + (len(few) > 1)] if max(few) == CHECKED else few
        cu = [0, *accumulate(few)]
        given, do = operands(cu[-1]), setting.randn(cu[-1], heads, dim)
        group = heads // keys
        wide = [x.detach().double().requires_grad_() for x in (given[0][:, :group], given[1][:, 0], given[2][:, 0])]
        o, exact = attend("triton", *given, cu=cu), _exact(*wide, cu, scores)
        off = 1e-2 if o.dtype is torch.bfloat16 else 1e-5  # probabilities are rounded before the second product
        if not backward:
            yield Compared("o", o[:, :group].detach(), exact.detach(), wide=off)
            return
        found = torch.autograd.grad(o, given, do)
        expected = torch.autograd.grad(exact, wide, do[:, :group].double())
        for what, one, other in zip("qkv", found, expected, strict=True):
            yield Compared(f"d{what}", one[:, :group] if what == "q" else one[:, 0], other, wide=off)

    asked = Asked(
        setting.dtype, dim, "softcap" in extras, "ALiBi" in extras, window="window" in extras, deterministic=deterministic
    )
    available = Available.on(setting.device)
    peers = {name: partial(of_backend, name) for name in BACKENDS}
    if extras:
        del peers["sdpa"]  # it makes the matrix of scores
    elif setting.device.type == "cuda":
        peers["FlexAttention"] = lambda: timed(_flex(setting, cu))
    flops = 4.0 * heads * dim * _pairs(lengths, scores.window) * (2.5 if backward else 1.0)
    notes = {"auto": choose("auto", asked, available).name}
    return Case(timed(partial(attend, "triton", shared={})), check, peers, flops=flops, notes=notes)


def _forward(function: Run, *given: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = function(*given)
    return out


def cases(setting: Setting) -> Cases:
    kinds: dict[str, tuple[Sequence[int], int, tuple[str, ...]]] = {
        "8k": ([8192] * 2, 128, ()),
        "2k": ([2048] * 8, 128, ()),
        "4k": ([4096] * 4, 128, ()),
        "16k": ([16384], 128, ()),
        "packed": (PACKED, 128, ()),
        "8k, head size 64": ([8192] * 2, 64, ()),
        "8k, deterministic": ([8192] * 2, 128, ("deterministic",)),
        "8k, window of 1024": ([8192] * 2, 128, ("window",)),
        "8k, soft cap": ([8192] * 2, 128, ("softcap",)),
        "8k, ALiBi": ([8192] * 2, 128, ("ALiBi",)),
    }
    return {
        f"attention {kind} {'backward' if backward else 'forward'}": partial(_case, setting, *how, backward)
        for kind, how in kinds.items()
        for backward in (False, True)
        if backward or "deterministic" not in how[2]
    }
