"""The sum of squares of a bucket's gradients."""

from megatron_llm.ops.triton.grad_norm import BLOCK, BLOCKS, WARPS
from tests.ops.triton.compiler import Case

CASES = [
    Case(
        f"sum of squares {dtype}",
        "grad_norm:squares_kernel",
        {"X": f"*{dtype}", "PARTIAL": "*fp32", "n": "i32"},
        {"BLOCK": BLOCK, "BLOCKS": BLOCKS},
        {"num_warps": WARPS},
        ("X", "PARTIAL", "n"),
        sixteen_bytes=True,
    )
    for dtype in ("fp32", "bf16")
]
