"""SwiGLU, GeGLU and a plain activation of a Llama-like MLP: [8192, 2 x 14336]."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from benchmarks.gpu.measure import Case, Cases, Compared, Run, Setting, compiled, gradient

FUNCTIONS = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def _plain(x: Tensor, name: str, gated: bool) -> Tensor:
    if not gated:
        return FUNCTIONS[name](x)
    gate, up = x.chunk(2, -1)
    return FUNCTIONS[name](gate) * up


def _case(setting: Setting, name: str, gated: bool, backward: bool) -> Case:
    from megatron_llm.ops.activation import activation
    from megatron_llm.ops.activation import gated as gated_activation

    tokens, size = setting.size(8192, 3), setting.size(14336, 48)
    ours = partial(gated_activation if gated else activation, name=name, kernel="triton")
    plain = partial(_plain, name=name, gated=gated)
    x, dy = setting.randn(tokens, size * (1 + gated), grad=True), setting.randn(tokens, size)

    def liger() -> Run:
        from liger_kernel.transformers import functional as liger_functional

        function = {"silu": liger_functional.liger_swiglu, "gelu_tanh": liger_functional.liger_geglu}[name]
        gate, up = (half.detach().contiguous().requires_grad_() for half in x.chunk(2, -1))
        return timed(lambda _: function(gate, up), [gate, up])

    def timed(function: Run, inputs: list[Tensor] | None = None) -> Run:
        if backward:
            return gradient(function(x), inputs or [x], dy)
        return partial(_forward, function, x)

    def check() -> Iterator[Compared]:
        few, grad = x.detach()[:256].requires_grad_(), dy[:256]
        wide = few.detach().double().requires_grad_()
        y, expected = ours(few), plain(wide)
        if backward:
            yield Compared("dx", *torch.autograd.grad(y, few, grad), *torch.autograd.grad(expected, wide, grad.double()))
        else:
            yield Compared("y", y.detach(), expected.detach())

    peers = {"torch": lambda: timed(plain), "Liger": liger, "torch.compile": lambda: timed(compiled(plain))}
    if not gated:
        del peers["Liger"]
    moved = (5 if backward else 3) if gated else (3 if backward else 2)
    return Case(timed(ours), check, peers, bytes=float(moved * tokens * size * x.element_size()))


def _forward(function: Run, x: Tensor) -> Tensor:
    with torch.no_grad():
        return function(x)


def cases(setting: Setting) -> Cases:
    kinds = {"SwiGLU": ("silu", True), "GeGLU": ("gelu_tanh", True), "GELU": ("gelu_tanh", False)}
    return {
        f"{kind} {'backward' if backward else 'forward'}": partial(_case, setting, *how, backward)
        for kind, how in kinds.items()
        for backward in (False, True)
    }
