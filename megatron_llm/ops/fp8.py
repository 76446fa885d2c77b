"""Products of linear layers from 8-bit operands, for `precision.linear: fp8`. Called by `parallel/linear.py`.

    y  [T, O] = x W^T       x by its rows, W by its rows
    dx [T, I] = dy W        dy by its rows, W by its columns
    dW [O, I] = dy^T x      stays in the compute dtype (`parallel/weight_grad.py`)

Every vector that is summed over gets a scale from its own largest magnitude at the moment it is multiplied (current scaling: no
history, nothing to save), and numbers in e4m3, of 4 bits of exponent and 3 of mantissa. torch's GEMM for such operands multiplies
them exactly, sums in float32, multiplies each sum by both scales and rounds it once to bfloat16.

Scales are powers of two, chosen so that the largest number lies in (224, 448], of which 448 is the last of e4m3: nothing
saturates. Scaling is exact, so a number is off by at most 2^-4 of itself, if it is at least 2^-13 of the largest, and by 2^-17 of
the largest below that: numbers above do not depend on which scale it is. So neither the other tokens of a micro-batch nor the cut
of a vector over tensor-parallel ranks matter to what becomes of a number, up to that floor. A vector that holds an infinity or a
nan makes all its results nan, as `training/nonfinite.py` wants to see them.

It is what torchao calls rowwise_with_gw_hp (tests compare), but that W has a scale for each of its columns in dx, and no single
one. dW is left as it is because little is to be won: it would need dy and x again, transposed and in 8 bits, and a GEMM of 8-bit
operands cannot add to a main gradient. By estimate these passes over memory take half of what the GEMM saves (H200, 8k tokens, 4k
features).

Shape suffixes: T tokens, I input features, O output features (local), M, N rows, K summed over.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLE = 16
"""Both sizes of a weight must be multiples of it: cuBLAS and CUTLASS read 16 bytes at a time. The number of tokens is free."""

_E4M3 = torch.float8_e4m3fn
_INFINITY = 0x7F800000  # the bits of a float32; those of a nan are more


def fp8_problem(device: str) -> str | None:
    """Why a kind of device cannot multiply so; None if it can."""
    need = "fp8 needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell)"
    if device != "cuda" or torch.version.hip is not None:
        return f"{need}; remove it, or set it to compute"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        return f"{need}, and {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}; remove it, or set it to compute"
    return None


def product(x_TI: Tensor, weight_OI: Tensor, bias: Tensor | None = None, kernel: str = "torch") -> Tensor:
    """x W^T + b in bfloat16: [T, I] x [O, I] -> [T, O]. kernel: which makes the 8-bit numbers, "torch" or "triton"."""
    return _multiply(quantize(x_TI, kernel), quantize(weight_OI, kernel), bias, True)


def input_gradient(dy_TO: Tensor, weight_OI: Tensor, kernel: str = "torch") -> Tensor:
    """dy W in bfloat16: [T, O] x [O, I] -> [T, I]."""
    return _multiply(quantize(dy_TO, kernel), quantize(weight_OI.t(), kernel), None, False)


def quantize(x_MK: Tensor, kernel: str = "torch") -> tuple[Tensor, Tensor]:
    """(e4m3 numbers [M, K], contiguous; what to multiply each row by [M, 1], float32): rows in 8 bits.

    x: of any float dtype up to float32 and of any strides; a float32 one that was bfloat16 gives the same.
    """
    if kernel == "triton":
        from megatron_llm.ops.triton.fp8 import quantize as fused

        return fused(x_MK if 1 in x_MK.stride() else x_MK.contiguous())
    largest = x_MK.abs().amax(1, keepdim=True)
    bits = largest.float().view(torch.int32)
    # Of 2^e m with 1 <= m < 2 the inverse scale is 2^(e - 8) up to m = 1.75 (448 = 1.75 * 2^8) and twice that above.
    exponent = ((bits.clamp(max=_INFINITY) + 0x1FFFFF) >> 23).clamp(min=9)
    inverse = ((exponent - 8) << 23).view(torch.float32).masked_fill(bits >= _INFINITY, torch.nan)
    scale = ((262 - exponent) << 23).view(torch.float32)
    return (x_MK * scale.to(x_MK.dtype)).to(_E4M3).contiguous(), inverse


def _multiply(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], bias: Tensor | None, fast: bool) -> Tensor:
    """[M, K] x [N, K] -> [M, N]. fast: Hopper sums in its tensor cores alone, in fewer bits than float32: usual forward."""
    (a_MK, a_M1), (b_NK, b_N1) = a, b
    if not len(a_MK):  # not every version of torch has a kernel for no rows
        return a_MK.new_empty(0, len(b_NK), dtype=torch.bfloat16)
    return torch._scaled_mm(a_MK, b_NK.t(), a_M1, b_N1.t(), bias, out_dtype=torch.bfloat16, use_fast_accum=fast)
