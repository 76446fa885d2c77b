"""Rotary embedding of 32 heads of queries and 8 of keys of 128 channels, 8192 tokens, in place."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.measure import Case, Cases, Compared, Run, Setting, compiled


def _plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Half rotation as transformers has it: cos and sin of a whole head."""

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return turned(q), turned(k)


def _case(setting: Setting, interleaved: bool, backward: bool) -> Case:
    """Backward of q and k beside a v: the gradient of the fused q, k and v is written, so v's is copied."""
    from megatron_llm.ops.rope import rope_frequencies, rope_tables
    from megatron_llm.ops.triton.rope import rope_, rope_join

    tokens, heads, keys, dim = setting.size(8192, 5), setting.size(32, 4), setting.size(8, 2), setting.size(128, 16)
    positions = torch.arange(tokens, device=setting.device)
    cos, sin = rope_tables(positions, rope_frequencies(dim, 5e5, None, torch.float32).to(setting.device))
    packed = setting.randn(tokens, heads + 2 * keys, dim)
    k, v, q = packed[:, :keys], packed[:, keys : 2 * keys], packed[:, 2 * keys :]

    def liger() -> Run:
        from liger_kernel.transformers import functional as liger_functional

        whole = [torch.cat((table, table), -1).to(setting.dtype)[:, 0][None] for table in (cos, sin)]
        given = [x.transpose(0, 1)[None].detach().requires_grad_(backward) for x in (q, k)]
        if not backward:
            return lambda: liger_functional.liger_rope(*given, *whole)
        out = liger_functional.liger_rope(*(x.clone() for x in given), *whole)
        grads = tuple(torch.ones_like(x) for x in out)
        return lambda: torch.autograd.grad(out, given, grads, retain_graph=True)

    def timed(function: Run) -> Run:
        whole = [torch.cat((table, table), -1).to(setting.dtype) for table in (cos, sin)]
        given = [x.detach().requires_grad_(backward) for x in (q, k)]
        if not backward:
            return lambda: function(*given, *whole)
        out = function(*given, *whole)
        return lambda: torch.autograd.grad(out, given, (q, k), retain_graph=True)

    def check() -> Iterator[Compared]:
        cos64, sin64 = cos.double(), sin.double()
        if backward:
            sin64 = -sin64
        expected = []
        for x in (q.double(), k.double()):
            a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
            pair = a * cos64 - b * sin64, b * cos64 + a * sin64
            expected.append(torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1))
        if backward:
            joined = rope_join(q, k, v, cos, sin, interleaved).view(packed.shape)
            yield Compared("dq", joined[:, 2 * keys :], expected[0])
            yield Compared("dk", joined[:, :keys], expected[1])
            yield Compared("dv", joined[:, keys : 2 * keys], v.double(), roundings=0.0, wide=0.0)
        else:
            fresh = packed.clone()
            rope_(fresh[:, 2 * keys :], fresh[:, :keys], cos, sin, interleaved)
            yield Compared("q", fresh[:, 2 * keys :], expected[0])
            yield Compared("k", fresh[:, :keys], expected[1])

    def ours() -> Run:
        return partial(rope_join, q, k, v, cos, sin, interleaved) if backward else partial(rope_, q, k, cos, sin, interleaved)

    peers = {"torch": lambda: timed(_plain), "Liger": liger, "torch.compile": lambda: timed(compiled(_plain))}
    moved = 2 * tokens * (heads + (2 if backward else 1) * keys) * dim * q.element_size()
    return Case(ours(), check, {} if interleaved else peers, bytes=float(moved))


def cases(setting: Setting) -> Cases:
    return {
        f"RoPE{' interleaved' if interleaved else ''} {'backward, q, k and v joined' if backward else 'forward'}": partial(
            _case, setting, interleaved, backward
        )
        for interleaved in (False, True)
        for backward in (False, True)
    }
