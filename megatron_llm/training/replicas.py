"""Whether all copies of weights are still equal to the bit. Called by `training/loop.py`: `training.check_replicas_every`.

Data-parallel ranks, replicated norms and KV heads, and an embedding tied across stages hold the same weights and never compare
them: a flipped bit, or a collective that went wrong on one rank, would train on unseen. What is a copy of what, the shard
descriptions say: equal rectangles of equal logical tensors.

Each rank hashes its rectangles on its device, waits for the device once, and sends the names, boxes and 8-byte hashes to all
others: about 50 bytes for a rectangle (a decoder layer has nine), whatever its size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_llm.models.stages import parameters
from megatron_llm.ops.random import random_bits
from megatron_llm.parallel.objects import all_gather_objects
from megatron_llm.parallel.shard import ShardSpec
from megatron_llm.training.agreement import AgreedError, name_ranks
from megatron_llm.training.build import Engine

_CHUNK_ELEMENTS = 1 << 22  # bounds the 64-bit temporaries
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMED = 8

_Rectangle = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Logical name, and offset and shape of the box of the logical tensor."""


def check_replicas(engine: Engine) -> None:
    """Raise AgreedError on all ranks, naming parameters and ranks, unless all copies of weights are equal. Collective."""
    engine.optimizer.wait_weights()
    problems = differing_copies(all_gather_objects(_local_hashes(engine), engine.grid.world))
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise AgreedError(
            f"copies of weights differ: {'; '.join(problems[:_NAMED])}{more}. A device or a link has computed or sent something "
            "wrong: look at the machines of these ranks, and go on from a checkpoint saved before"
        )


def differing_copies(hashes: list[dict[_Rectangle, int]]) -> list[str]:
    """A sentence for every rectangle whose copies differ. hashes: of every rank's rectangles, in rank order."""
    holders: dict[_Rectangle, dict[int, list[int]]] = {}
    for rank, of_rank in enumerate(hashes):
        for rectangle, value in of_rank.items():
            holders.setdefault(rectangle, {}).setdefault(value, []).append(rank)
    problems = []
    for (name, offset, shape), values in sorted(holders.items()):
        if len(values) == 1:
            continue
        most, *others = sorted(values.values(), key=len, reverse=True)
        where = f"{name} (the {' x '.join(map(str, shape))} elements at {', '.join(map(str, offset))})"
        if len(most) == len(others[0]):  # which of them is right, nobody knows
            groups = " and ".join(name_ranks(ranks) for ranks in [most, *others])
            problems.append(f"{where}: {groups} hold different values")
        else:
            wrong = sorted(rank for ranks in others for rank in ranks)
            problems.append(f"{where}: not on {name_ranks(wrong)} what it is on {name_ranks(most)}")
    return problems


@torch.no_grad()
def _local_hashes(engine: Engine) -> dict[_Rectangle, int]:
    """The hash of every rectangle of a logical tensor on this rank."""
    found: dict[_Rectangle, Tensor] = {}
    for parameter in parameters(engine.stages):
        spec: ShardSpec = parameter.shard  # type: ignore[attr-defined]
        for part in spec.parts:
            for local, logical in part.pairs:
                found[part.name, logical.offset, logical.shape] = hash_bits(parameter.data[local.slices])
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}


def hash_bits(values: Tensor) -> Tensor:
    """A 64-bit hash of a tensor's bits and their order, as an int64 scalar on its device.

    The sum of mixed (place, bits) does not depend on the order of addition. Places are mixed before bits are added to them:
    neither swapped values nor changes of several bits cancel other than by chance, and one changed element never does,
    because the mixing is one to one.
    """
    bits = values.reshape(-1).view(_INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, bits.numel(), _CHUNK_ELEMENTS):
        chunk = bits[start : start + _CHUNK_ELEMENTS].to(torch.int64)
        places = torch.arange(start, start + chunk.numel(), device=values.device)
        total += random_bits(0, random_bits(1, places) + chunk).sum()
    return total
