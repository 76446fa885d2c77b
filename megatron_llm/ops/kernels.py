"""Which implementation of an operation runs: section `kernels` of a config, made definite for a device and a dtype.

Called by `models/stages.py` and `training/build.py`; `training/resolve.py` asks for problems first. Operations get the name they
are to run, "torch" (the reference, everywhere) or "triton" (`ops/triton`), as an argument: nothing here is global. Attention has
more backends, and which one supports a case depends on the layer: `ops/attention.py` decides there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.util import find_spec

import torch

from megatron_llm.config import KernelsConfig

FUSED = ("norm", "rope", "activation", "cross_entropy", "embedding", "optimizer")
"""Operations with one kernel in Triton, by their key in section `kernels`."""

NARROW_ENOUGH = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernels:
    """By operation, as described in `KernelsConfig`. Each of `FUSED` is "torch" or "triton"."""

    attention: str = "auto"
    norm: str = "torch"
    rope: str = "torch"
    activation: str = "torch"
    cross_entropy: str = "torch"
    embedding: str = "torch"
    optimizer: str = "torch"
    deterministic: bool = False

    @classmethod
    def choose(cls, config: KernelsConfig, device: torch.device, dtype: torch.dtype) -> Kernels:
        """Raises ValueError with all that cannot run there (`kernel_problems`). dtype: what the model computes in."""
        if problems := kernel_problems(config, device.type, dtype):
            raise ValueError("; ".join(problems))
        fused = device.type == "cuda" and triton_problem(device.type, dtype) is None
        chosen = {field.name: getattr(config, field.name) for field in fields(cls)}
        chosen |= {name: "triton" if fused else "torch" for name in FUSED if chosen[name] == "auto"}
        return cls(**chosen)


def triton_problem(device: str, dtype: torch.dtype) -> str | None:
    """Why kernels in Triton cannot run on tensors of a dtype on a kind of device; None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` (Linux only), or take torch"
    if dtype not in NARROW_ENOUGH:
        return f"kernels in Triton compute in float32, and the model in {str(dtype).removeprefix('torch.')}; take torch"
    if device == "cuda":
        return None
    from megatron_llm.ops.triton import interpreted

    return None if interpreted() else "kernels in Triton need an NVIDIA GPU; take torch, or auto"


def kernel_problems(config: KernelsConfig, device: str, dtype: torch.dtype) -> list[str]:
    """A sentence for every choice of section `kernels` that cannot run, whatever the model."""
    problem = triton_problem(device, dtype)
    return [f"kernels.{name}: {problem}" for name in (*FUSED, "attention") if problem and getattr(config, name) == "triton"]
