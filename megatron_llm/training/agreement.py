"""What all ranks must have in common before they train together, and the errors that all of them raise alike.

Called by `training/loop.py`, and by whatever else finds something wrong on all ranks at the same time.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_llm.config import Config
from megatron_llm.ops.random import stream_key
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.objects import all_gather_objects


class AgreedError(ValueError):
    """Raised on every rank with the same message, so that one of them is enough to say it."""


def check_same_config(config: Config) -> None:
    """Raise AgreedError on all ranks unless all have resolved the same settings. Collective over the whole world.

    Called before the grid is made: with different layouts the ranks would wait for each other in groups that not all make.
    Ranks exchange 8 bytes each, and their settings only if those differ.
    """
    if not dist.is_initialized():
        return
    me, size = dist.get_rank(), dist.get_world_size()
    world = Axis("world", me, size, tuple(range(size)), dist.group.WORLD)
    settings = _flat(config.model_dump(mode="json"))
    if len(set(all_gather_objects(stream_key(*sorted(map(repr, settings.items()))), world))) == 1:
        return
    gathered = all_gather_objects(settings, world)
    keys = sorted({key for settings in gathered for key in settings})
    problems = []
    for key in keys:
        holders: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(gathered):
            holders.setdefault(repr(of_rank.get(key)), []).append(rank)
        if len(holders) > 1:
            problems.append(f"{key} is " + ", ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in holders.items()))
    raise AgreedError(
        f"ranks were started with different settings: {'; '.join(problems)}. Give all of them the same file and the same "
        "section.key=value arguments; what a rank finds out itself (optimizer.lr: auto, training.steps: -1) needs the same data"
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by `section.key`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def name_ranks(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0, 1 and 4`; of many, the first few and how many there are."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 8:
        return f"ranks {', '.join(map(str, ranks[:8]))} and {len(ranks) - 8} more"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
