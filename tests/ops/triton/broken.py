"""A kernel launched in wrong ways, each of which `compiler.py` must find. Asked for by `test_compiled.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from tests.ops.triton.compiler import Case


@triton.jit
def product(A, B, C, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """C = sum of A B over blocks of K: tiles, stages of the pipeline and rows for the tensor cores are the caller's choice."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    c = tl.zeros((M, N), tl.float32)
    for step in range(steps):
        a = tl.load(A + m * 4096 + step * K + k[None, :])
        b = tl.load(B + (step * K + k[:, None]) * 4096 + n)
        c = tl.dot(a, b, c)
    tl.store(C + m * 4096 + n, c.to(C.dtype.element_ty))


_PRODUCT = {"A": "*bf16", "B": "*bf16", "C": "*bf16", "steps": "i32"}

CASES = [
    Case(
        "broken: spills",
        "tests.ops.triton.broken:product",
        _PRODUCT,
        {"M": 128, "N": 256, "K": 32},
        {"num_warps": 4, "num_stages": 2},
        ("A", "B", "C"),
        archs=(90,),
    ),
    Case(
        "broken: shared memory",
        "tests.ops.triton.broken:product",
        _PRODUCT,
        {"M": 128, "N": 128, "K": 128},
        {"num_warps": 8, "num_stages": 5},
        ("A", "B", "C"),
        archs=(80, 90),
    ),
    Case(
        "broken: no warpgroups",
        "tests.ops.triton.broken:product",
        _PRODUCT,
        {"M": 32, "N": 64, "K": 64},
        {"num_warps": 4, "num_stages": 2},
        ("A", "B", "C"),
        tensor_cores=True,
        archs=(90,),
    ),
    Case(
        "broken: narrow loads",
        "tests.ops.triton.broken:product",
        _PRODUCT,
        {"M": 64, "N": 64, "K": 64},
        {"num_warps": 4, "num_stages": 2},
        sixteen_bytes=True,
        archs=(90,),
    ),
    Case("broken: not compiled", "tests.ops.triton.broken:product", {}, {"M": 64, "N": 64, "K": 64}, archs=(90,)),
]
