"""As the head of Llama 3 launches them, Gemma 2's with its cap, and a vocabulary that nothing divides."""

from megatron_llm.ops.triton.cross_entropy import WARPS, backward_block, forward_block
from tests.ops.triton.compiler import Case

_FORWARD = {"X": "*bf16", "LABELS": "*i64", "OUT": "*fp32", "stride": "i32", "U": "i32", "cap": "fp32"}
_BACKWARD = {
    "X": "*bf16", "LABELS": "*i64", "LSE": "*fp32", "SCALE": "*fp32", "stride": "i32", "U": "i32", "V": "i32",
    "cap": "fp32", "smoothing": "fp32", "share": "fp32", "z_loss": "fp32",
}  # fmt: skip
_SIZES = {"*bf16": 2, "*fp32": 4}


def _forward(name: str, x: str, vocabulary: int, capped: bool, extra: str) -> Case:
    block, each = forward_block(vocabulary, _SIZES[x])
    return Case(
        f"cross_entropy forward {name}",
        "cross_entropy:forward_kernel",
        _FORWARD | {"X": x},
        {"CAPPED": capped, "EXTRA": extra, "BLOCK": block, "EACH": each},
        {"num_warps": WARPS},
        ("X", "LABELS", "OUT", "stride") + (("U",) if vocabulary % 16 == 0 else ()),
    )


def _backward(name: str, x: str, vocabulary: int, capped: bool, smoothed: bool) -> Case:
    return Case(
        f"cross_entropy backward {name}",
        "cross_entropy:backward_kernel",
        _BACKWARD | {"X": x},
        {"CAPPED": capped, "SMOOTHED": smoothed, "BLOCK": backward_block(vocabulary, _SIZES[x])},
        {"num_warps": WARPS},
        ("X", "LABELS", "LSE", "SCALE", "stride") + (("U", "V") if vocabulary % 16 == 0 else ()),
        sixteen_bytes=vocabulary % 16 == 0,
    )


CASES = [
    _forward("llama", "*bf16", 128256, False, ""),
    _forward("llama, float32", "*fp32", 128256, False, ""),
    _forward("llama scored", "*bf16", 128256, False, "best"),
    _forward("gemma smoothed", "*bf16", 256000, True, "sum"),
    _forward("uneven", "*bf16", 50257, False, ""),
    _backward("llama", "*bf16", 128256, False, False),
    _backward("llama, float32", "*fp32", 128256, False, False),
    _backward("gemma smoothed", "*bf16", 256000, True, True),
    _backward("uneven", "*bf16", 50257, False, False),
]
