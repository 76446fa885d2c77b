"""Why a run cannot have `precision.linear: fp8`, found before it starts. Called by `training/resolve.py`.

The products themselves: `ops/fp8.py`.
"""

from __future__ import annotations

from megatron_llm.config import Config
from megatron_llm.ops.fp8 import MULTIPLE, fp8_problem
from megatron_llm.planning.share import Share


def fp8_device_problems(config: Config, device: str) -> list[str]:
    """device: the kind that the run will compute on."""
    problem = fp8_problem(device) if config.precision.linear == "fp8" else None
    return [f"precision.linear: {problem}"] if problem else []


def fp8_size_problems(config: Config) -> list[str]:
    """A sentence for every size of a linear layer that cannot be multiplied so as tensor parallelism cuts it.

    The layout must be possible otherwise.
    """
    if config.precision.linear != "fp8":
        return []
    found: dict[str, str] = {}
    for rank in range(tp := config.parallel.tensor_parallel):
        for name, size in _sizes(config, Share.of(config, rank)).items():
            if size % MULTIPLE:
                holder = "is" if tp == 1 or name == "hidden_size" else f"on tensor-parallel rank {rank} of {tp} is"
                found.setdefault(name, f"model.{name} {holder} {size}")
    return [
        f"precision.linear: fp8 multiplies {MULTIPLE} numbers at a time, and {what}, no multiple of {MULTIPLE}; "
        + ("choose another parallel.tensor_parallel, or " if tp > 1 else "")
        + "set precision.linear=compute"
        for what in found.values()
    ]


def _sizes(config: Config, share: Share) -> dict[str, int]:
    """Rows and columns of the weights of a layer on a rank, by what they are in section `model`."""
    model = config.model
    return {
        "hidden_size": model.hidden_size,
        "num_attention_heads * head_dim": share.queries * model.head_dim,
        "(num_attention_heads + 2 * num_key_value_heads) * head_dim": (share.queries + 2 * share.keys) * model.head_dim,
        "intermediate_size": share.inner,
    }
