"""As the norms of models launch them: hidden states of 2048 to 16384 channels, heads of 64 to 256."""

from __future__ import annotations

from typing import Any

from megatron_llm.ops.triton.norm import launch, launch_backward
from tests.ops.triton.compiler import Case

_FORWARD = ("X", "F", "W", "B", "S", "Y", "STATS", "x_token", "x_head", "f_token", "tokens", "eps", "offset")
_BACKWARD = (
    "DY", "X", "STATS", "W", "DRES", "DX", "SUMS", "dy_token", "dy_head", "x_token", "x_head", "dres_token", "tokens", "blocks",
    "offset",
)  # fmt: skip
_FLOATS = {"STATS": "*fp32", "SUMS": "*fp32", "eps": "fp32", "offset": "fp32"}


def _case(kind: str, size: int, heads: int, absent: tuple[str, ...], center: bool, per_head: bool = False) -> Case:
    """absent: pointers that are None, and strides that are 0."""
    forward = "backward" not in kind
    chosen = launch(size) if forward else launch_backward(size)
    constants: dict[str, Any] = {name: 0 if "_" in name else None for name in absent}
    constants |= {"D": size, "HEADS": heads, "PER_HEAD": per_head, "CENTER": center}
    constants |= {"ROUND": not center} if forward else {"BIAS": center and not chosen["WIDE"]}
    constants |= {name: value for name, value in chosen.items() if name.isupper()}
    options = {"num_warps": chosen["num_warps"]}
    names = [name for name in (_FORWARD if forward else _BACKWARD) if name not in constants]
    signature = {name: _FLOATS.get(name) or ("i64" if "_" in name else "*bf16" if name.isupper() else "i32") for name in names}
    aligned = tuple(name for name in names if name not in ("eps", "offset", "blocks"))
    return Case(
        f"norm {kind} {size}{' heads' if heads > 1 else ''}",
        f"norm:{'forward' if forward else 'backward'}_kernel",
        signature, constants, options, aligned, sixteen_bytes=True,
    )  # fmt: skip


_RMS_ALONE, _RMS_ADDED = ("F", "B", "S", "f_token", "x_head"), ("B", "x_head")
_BACK, _BACK_ADDED = ("DRES", "dres_token", "dy_head", "x_head"), ("dy_head", "x_head")

CASES = [
    *(_case("rms", size, 1, _RMS_ALONE, False) for size in (2048, 4096, 16384)),
    *(_case("rms added", size, 1, _RMS_ADDED, False) for size in (3072, 4096, 8192, 16384)),
    *(_case("layer added", size, 1, ("x_head",), True) for size in (4096, 16384)),
    *(_case("rms", size, 8, ("F", "B", "S", "f_token"), False) for size in (64, 80, 128, 256)),
    _case("layer per head", 128, 8, ("F", "B", "S", "f_token"), True, per_head=True),
    *(_case("rms backward", size, 1, _BACK, False) for size in (2048, 4096, 16384)),
    *(_case("rms backward added", size, 1, _BACK_ADDED, False) for size in (3072, 4096, 8192, 16384)),
    *(_case("layer backward added", size, 1, _BACK_ADDED, True) for size in (4096, 8192, 16384)),
    *(_case("rms backward", size, 8, ("DRES", "dres_token"), False) for size in (64, 80, 128, 256)),
    _case("layer backward per head", 128, 8, ("DRES", "dres_token"), True, per_head=True),
]
