"""Says on every rank which rank of the pipeline failed first, and why. Used by `pipeline/runtime.py`.

A rank notices only that a neighbour has gone, and the neighbour may have gone because it lost its own neighbour. So a rank
that fails leaves the cause, its own or the one it was told, in the store of the process group before it goes, and a rank
that loses a neighbour looks there. Who left no word was killed or hangs.

With NCCL a lost neighbour does not surface here: the watchdog thread of torch ends the process when `timeout_seconds` are over.
"""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_llm.parallel.grid import Grid

_PATIENCE_SECONDS = 1.0  # for the word of a neighbour that runs into its own time limit a little later


class PeerLostError(RuntimeError):
    """A message could not be exchanged. `peer` is the pipeline rank at its other end."""

    def __init__(self, peer: int, text: str):
        super().__init__(text)
        self.peer = peer


def leave_cause(grid: Grid, cause: str) -> None:
    """Leave word of why this rank is about to end."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the store has gone with its rank: nobody can be told
            _store().set(_key("cause", grid, grid.pp.rank), cause)


def cause_of_loss(grid: Grid, peer: int) -> str:
    """Who failed first, and why, when this rank has lost the pipeline rank `peer`."""
    try:
        return _follow(_store(), grid, peer)
    except RuntimeError:
        return "nothing more is known, as the store of the run is gone too, which its rank 0 or its launcher holds"


def _follow(store: dist.Store, grid: Grid, peer: int) -> str:
    """This rank says at once whom it lost, and goes on to ask for the word of whom its peer has lost, and so on: if a rank
    hangs, all others run into their limits at about the same time.
    """
    store.set(_key("lost", grid, grid.pp.rank), str(peer))
    seen, deadline = {grid.pp.rank}, time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if store.check([_key("cause", grid, peer)]):
            return store.get(_key("cause", grid, peer)).decode()
        if peer not in seen and store.check([_key("lost", grid, peer)]):
            seen.add(peer)
            peer = int(store.get(_key("lost", grid, peer)))
            deadline = time.monotonic() + _PATIENCE_SECONDS
        time.sleep(0.02)
    waits = "it waits as well" if peer in seen else "it was killed, or it hangs"
    return f"pipeline rank {peer} (rank {grid.pp.ranks[peer]} of the run) left no word: {waits}"


def _store() -> dist.Store:
    """The store of the run, with a short limit on its waits."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=5))
    return store


def _key(kind: str, grid: Grid, rank: int) -> str:
    return f"pipeline failure, {kind}: {grid.pp.ranks[rank]}"
