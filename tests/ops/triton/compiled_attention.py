"""As models of every head dimension launch attention: plain, and with all that takes registers; 128 with each feature alone."""

from __future__ import annotations

from typing import Any

import triton

from megatron_llm.ops.triton.attention import launch
from tests.ops.triton.compiler import Case

_POINTERS = ("Q", "K", "V", "OUT", "DO", "DK", "DV", "DQ")
_STRIDES = tuple(f"{x}_{what}" for x in ("q", "k", "v", "do") for what in ("stride", "head"))
_SIGNATURE = (
    dict.fromkeys(_POINTERS, "*bf16")
    | dict.fromkeys(("LSE", "DELTA", "SLOPES"), "*fp32")
    | dict.fromkeys((*_STRIDES, "T", "window", "heads"), "i32")
    | dict.fromkeys(("scale", "scale_log2", "cap_scale", "cap_log2"), "fp32")
    | {"TILES": "*i32"}
)
_ALIGNED = {
    "forward": ("Q", "K", "V", "OUT", "LSE", *_STRIDES[:6]),
    "dkdv": ("Q", "K", "V", "DO", "LSE", "DELTA", "DK", "DV", *_STRIDES),
    "dq": ("Q", "K", "V", "DO", "LSE", "DELTA", "DQ", *_STRIDES),
}
_FEATURES: dict[str, dict[str, bool]] = {
    "plain": {},
    "window": {"WINDOW": True},
    "softcap": {"CAP": True},
    "alibi": {"ALIBI": True},
    "all": {"WINDOW": True, "CAP": True, "ALIBI": True, "COARSE": True},
}
_COMPILED = {
    90: {64: ("plain", "all"), 80: ("all",), 96: ("plain",), 128: tuple(_FEATURES), 256: ("plain", "all")},
    80: {64: ("all",), 128: ("plain", "all"), 256: ("all",)},
    100: {64: ("all",), 128: ("plain", "all"), 256: ("all",)},
}


def _cases(direction: str, arch: int, head_dim: int, name: str) -> list[Case]:
    features = _FEATURES[name]
    chosen = launch(direction, arch, head_dim, extras=bool(features))
    m, n = (chosen.block, chosen.rows) if direction == "dkdv" else (chosen.rows, chosen.block)
    constants: dict[str, Any] = {
        "GROUP": 4,
        "D": head_dim,
        "DP": triton.next_power_of_2(head_dim),
        "M": m,
        "N": n,
        "CAP": features.get("CAP", False),
        "COARSE": features.get("COARSE", False),
        "WINDOW": features.get("WINDOW", False),
    } | ({} if features.get("ALIBI") else {"SLOPES": None})
    parts = [("dk", {"DV": None}), ("dv", {"DK": None})] if chosen.apart else [(direction, {})]
    return [
        Case(
            f"attention {part} D={head_dim} {name} sm_{arch}",
            f"attention_kernels:{direction}_kernel",
            _SIGNATURE,
            constants | without,
            {"num_warps": chosen.warps, "num_stages": chosen.stages},
            tuple(arg for arg in _ALIGNED[direction] if arg not in without),
            tensor_cores=True,
            archs=(arch,),
        )
        for part, without in parts
    ]


CASES = [
    case
    for arch, head_dims in _COMPILED.items()
    for head_dim, names in head_dims.items()
    for name in names
    for direction in ("forward", "dkdv", "dq")
    for case in _cases(direction, arch, head_dim, name)
]
