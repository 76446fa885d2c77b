"""Which implementation of an operation runs: section `kernels` of a config, made definite for a device and a dtype.

Called by `models/stages.py` and `training/build.py`; `training/resolve.py` asks for problems first. Operations get the name they
are to run, "torch" (the reference, everywhere) or "triton" (`ops/triton`), as an argument: nothing here is global. Attention has
more backends, and which one supports a case depends on the layer: `ops/attention.py` decides there.

With `kernels.deterministic` every kernel of `ops/triton` and every library of attention sums in an order that does not change;
torch's own do if torch is told (`deterministic_algorithms`), at the price of slower ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec

import torch
import torch.utils.deterministic

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
        """Raises ValueError with all that cannot run there (`kernel_problems`; on "meta" nothing runs). dtype: what the model
        computes in.
        """
        if problems := kernel_problems(config, device.type, dtype):
            raise ValueError("; ".join(problems))
        fused = device.type == "cuda" and triton_problem(device.type, dtype) is None
        chosen = {field.name: getattr(config, field.name) for field in fields(cls)}
        chosen |= {name: "triton" if fused else "torch" for name in FUSED if chosen[name] == "auto"}
        return cls(**chosen)


def triton_problem(device: str, dtype: torch.dtype) -> str | None:
    """Why kernels in Triton cannot run on tensors of a dtype on a kind of device; None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton; Linux only)"
    if dtype not in NARROW_ENOUGH:
        return f"kernels in Triton compute in float32, and the model in {str(dtype).removeprefix('torch.')}"
    if device == "cuda":
        return None
    from megatron_llm.ops.triton import interpreted

    return None if interpreted() else "kernels in Triton need an NVIDIA GPU"


def kernel_problems(config: KernelsConfig, device: str, dtype: torch.dtype) -> list[str]:
    """A sentence for every choice of one of `FUSED` that cannot run, whatever the model."""
    problem = None if device == "meta" else triton_problem(device, dtype)
    chosen = [name for name in FUSED if problem and getattr(config, name) == "triton"]
    return [f"kernels.{name}: {problem}; take torch, or auto" for name in chosen]


def prepare_deterministic_products() -> None:
    """Give cuBLAS work space of a fixed size, without which torch refuses matrix products among `deterministic_algorithms`.

    Once a process, before its first product: cuBLAS reads it then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Have torch take algorithms on GPUs that make the same bits again, if wanted: of sums by index, and of the backward of
    varlen and sdpa attention.

    Only while a step is trained, as torch is told for the whole process, and has no such algorithm for what sampling does. New
    memory is not filled before it is written, which torch would do besides.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
