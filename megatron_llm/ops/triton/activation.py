"""Activations of the MLP, gated or plain, forward and backward. Called by `ops/activation.py`, which has the reference.

    gated       y = act(gate) * up           dgate = dy * up * act'(gate),  dup = dy * act(gate)
    plain       y = act(x)                   dx = dy * act'(x)

Bytes an element of y in 2-byte numbers: gated 6 forward (gate, up; y) and 10 backward (dy, gate, up; dgate, dup), plain 4 and 6.
The activation is made again in backward. gate and up are read by their offset in the fused [T, 2F]: nothing is copied apart.

Shape suffixes: T tokens, F intermediate size (local).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_llm.ops.triton import cdiv
from megatron_llm.ops.triton.maths import tanh

BLOCK = 1024  # elements of a program: 8 of each operand a thread, 16 bytes
WARPS = 4


@triton.jit
def _activation(x, ACT: tl.constexpr):
    """(act(x), act'(x)); what is not used the compiler leaves out."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        y, dy = x * s, s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        p = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y, dy = x * p, p + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        y = 0.5 * x * (1.0 + t)
        dy = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    else:
        tl.static_assert(ACT == "relu")
        y, dy = tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)  # maximum() would make 0 of nan
    return y, dy


@triton.jit
def forward_kernel(X, Y, stride, F, GATED: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (tokens, blocks of F). X: [T, 2F] or [T, F] with rows `stride` apart; Y: [T, F]."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = f < F
    x = tl.load(X + row * stride + f, mask=here, other=0.0).to(tl.float32)
    y, _ = _activation(x, ACT)
    if GATED:
        y *= tl.load(X + row * stride + F + f, mask=here, other=0.0).to(tl.float32)
    tl.store(Y + row * F + f, y.to(Y.dtype.element_ty), mask=here)


@triton.jit
def backward_kernel(DY, X, DX, dy_stride, stride, F, GATED: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """The same grid. DX is laid out as a contiguous X."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = f < F
    dy = tl.load(DY + row * dy_stride + f, mask=here, other=0.0).to(tl.float32)
    y, slope = _activation(tl.load(X + row * stride + f, mask=here, other=0.0).to(tl.float32), ACT)
    if GATED:
        up = tl.load(X + row * stride + F + f, mask=here, other=0.0).to(tl.float32)
        tl.store(DX + row * 2 * F + F + f, (dy * y).to(DX.dtype.element_ty), mask=here)
        tl.store(DX + row * 2 * F + f, (dy * up * slope).to(DX.dtype.element_ty), mask=here)
    else:
        tl.store(DX + row * F + f, (dy * slope).to(DX.dtype.element_ty), mask=here)


@torch.library.custom_op("megatron_llm::activation", mutates_args=())
def activation(x: Tensor, name: str, gated: bool) -> Tensor:
    """[T, 2F] (gate, then up), or without gate [T, F] -> [T, F]; the last dim is contiguous. name: as in `ops.activation`."""
    y = _fake(x, name, gated)
    tokens, size = y.shape
    if y.numel():
        forward_kernel[(tokens, cdiv(size, BLOCK))](x, y, x.stride(0), size, gated, name, BLOCK, num_warps=WARPS)
    return y


@activation.register_fake
def _fake(x: Tensor, name: str, gated: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2 if gated else x.shape[1])


@torch.library.custom_op("megatron_llm::activation_backward", mutates_args=())
def activation_backward(dy: Tensor, x: Tensor, name: str, gated: bool) -> Tensor:
    """The gradient of x, contiguous, of those of y: [T, F] with a contiguous last dim."""
    dx = _fake_backward(dy, x, name, gated)
    tokens, size = dy.shape
    if dx.numel():
        grid = (tokens, cdiv(size, BLOCK))
        backward_kernel[grid](dy, x, dx, dy.stride(0), x.stride(0), size, gated, name, BLOCK, num_warps=WARPS)
    return dx


@activation_backward.register_fake
def _fake_backward(dy: Tensor, x: Tensor, name: str, gated: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.name, ctx.gated = inputs[1:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (x,) = ctx.saved_tensors
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    return activation_backward(dy, x, ctx.name, ctx.gated), None, None


activation.register_autograd(_backward, setup_context=_save)
