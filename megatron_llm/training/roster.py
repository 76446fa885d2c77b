"""Ranks that begin together, in a store that outlives them. Called by `training/distributed.py`.

Under torchrun the store may be that of its agents and survive the ranks: what those before a restart left there, their
addresses and their last words, must not be taken for ours. How often ranks were restarted tells them apart on one node only: each
node's agent counts for itself, and does not count what it restarts for another node's sake. So ranks call out who they are:

    rank r     leaves its id;  waits for a roster that has it;  says yes to that roster;  waits for its start
    rank 0     writes down the ids that it finds as a roster, until all have said yes to one;  gives the start

An id of an earlier process gets no yes. The name of the roster is one that no earlier ranks have used.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_LOOK_SECONDS = 0.1
_ROSTER_SECONDS = 2.0  # rank 0 waits for yes to a roster before it looks for other ids


def roster_of(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name that these `world` processes have in common and no others. Raises TimeoutError if not all come in time."""
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"here {rank}", me)
    while time.monotonic() < deadline:
        name = _call(store, world) if rank == 0 else _answer(store, rank, me)
        if name:
            return name
        time.sleep(_LOOK_SECONDS)
    raise TimeoutError(f"rank {rank}: not all of {world} ranks were there within {timeout.total_seconds():g} s")


def _call(store: dist.Store, world: int) -> str:
    """Rank 0: the name of a roster that all said yes to; "" if not all have."""
    keys = [f"here {rank}" for rank in range(world)]
    if not store.check(keys):
        return ""
    ids = [store.get(key).decode() for key in keys]
    name = hashlib.sha256("".join(ids).encode()).hexdigest()[:16]
    store.set("roster", json.dumps([name, ids]))
    until = time.monotonic() + _ROSTER_SECONDS
    while time.monotonic() < until:
        if store.check([f"yes {name} {rank}" for rank in range(1, world)]):
            store.set(f"start {name}", "")
            return name
        time.sleep(_LOOK_SECONDS)
    return ""


def _answer(store: dist.Store, rank: int, me: str) -> str:
    """Another rank: the name of the roster that has begun with this process; "" if none has."""
    if not store.check(["roster"]):
        return ""
    name, ids = json.loads(store.get("roster"))
    if rank >= len(ids) or ids[rank] != me:
        return ""
    store.set(f"yes {name} {rank}", "")
    return str(name) if store.check([f"start {name}"]) else ""
