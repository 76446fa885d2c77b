"""As the linear layers of a Llama launch them, and with sizes that fill no block. e4m3 needs sm_89 or more."""

from megatron_llm.ops.triton.fp8 import WARPS, blocks
from tests.ops.triton.compiler import Case

CASES = [
    Case(
        f"quantize_fp8 {'columns' if transposed else 'rows'} of {size}",
        "fp8:quantize_kernel",
        {"X": "*bf16", "Q": "*fp8e4nv", "INVERSE": "*fp32", "stride": "i32", "R": "i32", "K": "i32"},
        dict(zip(("TRANSPOSED", "BLOCK_R", "BLOCK_K"), (transposed, *blocks(8192, size, transposed)), strict=True)),
        {"num_warps": WARPS},
        ("X", "Q", "INVERSE", "stride", "R", "K"),
        sixteen_bytes=True,
        archs=(90, 100),
    )
    for transposed in (False, True)
    for size in (64, 4096)
]
