"""Updates as a bucket of bfloat16 weights launches them: masters apart, moments in float32 or bfloat16."""

from typing import Any

from megatron_llm.ops.triton.update import BLOCK, OPTIONS
from tests.ops.triton.compiler import Case

_SCALARS = ("keep", "rate", "b1", "c1", "b2", "c2", "root", "eps")


def _case(rule: str, gradient: str, moments: str) -> Case:
    tensors = {"W": "*fp32", "G": f"*{gradient}", "M": f"*{moments}", "V": f"*{moments}", "OUT": "*bf16", "F": "*fp32"}
    constants: dict[str, Any] = {"RULE": rule, "NARROW": moments == "bf16", "BLOCK": BLOCK}
    if rule != "adamw":
        constants["V"] = None
    signature = {**tensors, "n": "i32", **dict.fromkeys(_SCALARS, "fp32"), "offset": "i32"}
    return Case(
        f"update {rule}, gradient {gradient}, moments {moments}",
        "update:update_kernel",
        {name: kind for name, kind in signature.items() if name not in constants},
        constants,
        OPTIONS,
        ("n", *(name for name in tensors if name not in constants)),
        sixteen_bytes=True,
    )


CASES = [
    _case(rule, gradient, moments)
    for rule, gradient in (("adamw", "fp32"), ("adamw", "bf16"), ("lion", "fp32"), ("sgd", "fp32"))
    for moments in ("fp32", "bf16")
]
