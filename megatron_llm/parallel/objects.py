"""Objects from rank to rank, for rare moments: they are pickled, and on a GPU the device is waited for.

What a step exchanges goes through `collectives.py`. Called by `checkpoint/` and `training/`.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_llm.parallel.grid import Axis


def all_gather_objects(mine: Any, axis: Axis) -> list[Any]:
    """Every rank's object, in rank order, on every rank."""
    if axis.size == 1:
        return [mine]
    gathered: list[Any] = [None] * axis.size
    dist.all_gather_object(gathered, mine, group=axis.group)
    return gathered


def gather_objects_to_first(mine: Any, axis: Axis) -> list[Any]:
    """Every rank's object, in rank order, on the first rank; elsewhere nothing."""
    if axis.size == 1:
        return [mine]
    gathered: list[Any] | None = [None] * axis.size if axis.first else None
    dist.gather_object(mine, gathered, dst=axis.ranks[0], group=axis.group)
    return gathered or []
