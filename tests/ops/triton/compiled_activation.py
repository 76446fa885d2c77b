"""As Llama's MLP and a plain one launch them."""

from tests.ops.triton.compiler import Case

_ALIGNED = ("X", "Y", "stride", "F")
_BACKWARD = ("DY", "X", "DX", "dy_stride", "stride", "F")

CASES = [
    Case(
        f"activation {direction} {act} {'gated' if gated else 'plain'}",
        f"activation:{direction}_kernel",
        {name: "i64" if "stride" in name else "i32" if name == "F" else "*bf16" for name in aligned},
        {"GATED": gated, "ACT": act, "BLOCK": 1024},
        {"num_warps": 4},
        aligned,
        sixteen_bytes=True,
    )
    for direction, aligned in (("forward", _ALIGNED), ("backward", _BACKWARD))
    for act, gated in (("silu", True), ("gelu_tanh", True), ("gelu", False))
]
