"""RMSNorm and LayerNorm of [8192, 4096], alone and of a sum."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from benchmarks.gpu.measure import Case, Cases, Compared, Run, Setting, compiled, gradient

EPS = 1e-5


def _plain(center: bool, x: Tensor, weight: Tensor, bias: Tensor | None, f: Tensor | None) -> tuple[Tensor, ...]:
    """(y,) or (x + f, y), as it is written in torch."""
    s = x if f is None else x + f
    y = functional.layer_norm(s, s.shape[-1:], weight, bias, EPS) if center else functional.rms_norm(s, s.shape[-1:], weight, EPS)
    return (y,) if f is None else (s, y)


def _case(setting: Setting, center: bool, added: bool, backward: bool) -> Case:
    from megatron_llm.ops.norm import NormKind, add_norm, norm

    tokens, hidden = setting.size(8192, 5), setting.size(4096, 48)
    kind = NormKind(EPS, center=center, kernel="triton")

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None, f: Tensor | None) -> tuple[Tensor, ...]:
        return (norm(x, weight, bias, kind),) if f is None else add_norm(x, f, weight, bias, kind)

    plain = partial(_plain, center)
    x, f = setting.randn(tokens, hidden, grad=True), setting.randn(tokens, hidden, grad=True) if added else None
    weight, bias = setting.randn(hidden, grad=True), setting.randn(hidden, grad=True) if center else None
    outputs = 1 + added
    grads = tuple(setting.randn(tokens, hidden) for _ in range(outputs))

    def timed(function: Run) -> Run:
        inputs = [given for given in (x, weight, bias, f) if given is not None]
        if backward:
            return gradient(function(x, weight, bias, f), inputs, grads)
        return lambda: _forward(function, x, weight, bias, f)

    def liger() -> Run:
        from liger_kernel.transformers import functional as liger_functional

        def function(x: Tensor, weight: Tensor, bias: Tensor | None, f: Tensor | None) -> tuple[Tensor, ...]:
            if center:
                return (liger_functional.liger_layer_norm(x, weight, bias, EPS),)
            if f is None:
                return (liger_functional.liger_rms_norm(x, weight, EPS, in_place=False),)
            y, s = liger_functional.liger_fused_add_rms_norm(x, f, weight, EPS, in_place=False)
            return s, y

        return timed(function)

    def check() -> Iterator[Compared]:
        few = [given if given is None or given.dim() == 1 else given[:512] for given in (x, weight, bias, f)]
        own = [given if given is None else given.detach().requires_grad_() for given in few]
        wide = [given if given is None else given.detach().double().requires_grad_() for given in few]
        if added:  # the sum that is normalized is the rounded one
            s = (own[0] + own[3]).detach()
            wide[0], wide[3] = s.double().requires_grad_(), torch.zeros_like(s, dtype=torch.float64).requires_grad_()
        actual, expected = ours(*own), plain(*wide)
        if not backward:
            for what, one, other in zip(("s", "y")[-outputs:], actual, expected, strict=True):
                yield Compared(what, one.detach(), other.detach())
            return
        given = [grad[:512] for grad in grads]
        inputs = [[one for one in some if one is not None] for some in (own, wide)]
        found = torch.autograd.grad(actual, inputs[0], given)
        exact = torch.autograd.grad(expected, inputs[1], [grad.double() for grad in given])
        for what, one, other in zip(("dx", "dw", "db", "df") if center else ("dx", "dw", "df"), found, exact, strict=False):
            yield Compared(what, one, other)

    peers = {"torch": lambda: timed(plain), "Liger": liger, "torch.compile": lambda: timed(compiled(plain))}
    if center and added:
        del peers["Liger"]
    moved = (4 if added else 3) if backward else (4 if added else 2)
    return Case(timed(ours), check, peers, bytes=float(moved * tokens * hidden * x.element_size()))


def _forward(function: Run, *given: Tensor | None) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return function(*given)


def cases(setting: Setting) -> Cases:
    kinds = {"RMSNorm": (False, False), "addition and RMSNorm": (False, True), "LayerNorm": (True, False)}
    return {
        f"{kind} {'backward' if backward else 'forward'}": partial(_case, setting, *how, backward)
        for kind, how in kinds.items()
        for backward in (False, True)
    }
