"""The kernels in Triton, one file for each file of `ops` that has the reference; imported by those, when they are to run.

Each file holds kernels, which open with their equation, the bytes they must move and what is made again, and the operators around
them: `torch.library.custom_op("megatron_llm::...")` with a fake (shapes, for torch.compile) and, where an operator is
functional, its derivative. An operator allocates what it returns and decides block sizes from shapes; it checks nothing that its
caller in `ops` has checked.

Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) runs the same kernels on CPU tensors: that is how tests
compare them with float64 where there is no GPU. Kernels compute in float32 and count elements in int64.

Nothing here is imported unless it is to run: the package works without Triton.
"""

from __future__ import annotations

from typing import Any


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def stream_multiprocessors(x: Any) -> int:
    """How many the GPU of a tensor has, for persistent kernels; a few in the interpreter, so that loops over blocks are run."""
    import torch

    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
