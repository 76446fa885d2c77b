"""The gradient of Llama's embedding into float32 main gradients, and of a small one into bfloat16 ones."""

from megatron_llm.ops.triton.embedding import JOINED, JOINED_BLOCK, WARPS, WINDOW, block_of
from tests.ops.triton.compiler import Case

_POINTERS = {"ROWS": "*i32", "ORDER": "*i64", "DY": "*bf16", "TABLE": "*fp32", "PARTIAL": "*fp32"}
_SIZES = {"T": "i32", "V": "i32", "H": "i32"}
_ALIGNED = (*_POINTERS, "T", "V", "H", "dy_stride", "stride")


def _case(kernel: str, hidden: int, table: str) -> Case:
    runs, block = kernel == "runs", block_of(hidden)
    pointers = {**_POINTERS, "TABLE": f"*{table}"}
    strides = {"dy_stride": "i32", "stride": "i32"}
    if not runs:
        block = min(block, JOINED_BLOCK)
        del pointers["ORDER"], pointers["DY"], strides["dy_stride"]
    signature = pointers | _SIZES | strides
    constants = {"WINDOW": WINDOW, "BLOCK": block} | ({} if runs else {"JOINED": JOINED})
    return Case(
        f"embedding {kernel} of {hidden} columns, {table}",
        f"embedding:{kernel}_kernel",
        signature,
        constants,
        {"num_warps": WARPS},
        tuple(name for name in _ALIGNED if name in signature),
        sixteen_bytes=runs or table == "fp32",  # of the sum of a long run in bfloat16 a thread stores 8
        narrow=6,  # places and ids of tokens
    )


CASES = [_case(kernel, hidden, table) for kernel in ("runs", "join") for hidden, table in ((4096, "fp32"), (768, "bf16"))]
