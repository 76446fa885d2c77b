"""Who sits where: the mesh of ranks, made once from the config and the world, passed to everything that communicates.

Axes from outer to inner are pp, dp, cp, tp: tensor-parallel neighbours share a node, pipeline stages are far apart.
There is no global state: whoever needs a group is given the `Grid` or one of its axes. Called by `training/loop.py`.

"axis" always means a mesh axis; tensors have dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch.distributed as dist

from megatron_llm.config import ParallelConfig
from megatron_llm.parallel.traffic import Traffic
from megatron_llm.parallel.waits import Waits


@dataclass(frozen=True)
class Axis:
    """One rank's view of a set of ranks that communicate: its place, how many there are, and the group.

    `group` is None when the axis has a single rank: collectives then return their input. `traffic` counts what goes over it;
    `waits`, which all axes of a grid share, measures how long the rank stands still for others.
    """

    name: str
    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    waits: Waits = field(default_factory=Waits, repr=False, compare=False)
    traffic: Traffic = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "traffic", Traffic(self.size))

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Grid:
    """The mesh as one rank sees it.

    Attributes:
        pp, dp, cp, tp: the mesh axes.
        dp_cp: data and context parallel ranks together: gradients reduce and ZeRO-1 shards over it.
        world: all ranks.
        kv_replica: the tensor-parallel neighbours that hold a copy of the same key/value heads (tp > KV heads).
        tied: the pipeline ranks of the first and the last stage of this rank's column, which share a tied embedding;
            size 1 for ranks in between, and where both stages are on one rank.
        pp_forward, pp_backward: the pipeline's ranks again, one group for messages to higher ranks and one for those to
            lower ranks, because the order of messages in one NCCL communicator must be the same at both ends.
    """

    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    dp_cp: Axis
    world: Axis
    kv_replica: Axis
    tied: Axis
    pp_forward: Axis
    pp_backward: Axis

    @classmethod
    def single(cls) -> Grid:
        """The grid of one process without any process group."""
        waits = Waits()
        return cls(*(Axis(name, waits=waits) for name in cls.__dataclass_fields__))

    @classmethod
    def build(cls, parallel: ParallelConfig, num_key_value_heads: int) -> Grid:
        """Make the groups. Collective: every rank of the initialized default process group must call it.

        Raises ValueError if the layout does not divide the world (`training/resolve.py` finds that out earlier).
        """
        if not dist.is_initialized():
            return cls.single()
        timeout = timedelta(seconds=parallel.timeout_seconds)
        return cls._of(
            parallel,
            num_key_value_heads,
            dist.get_world_size(),
            dist.get_rank(),
            lambda name, ranks: dist.new_group(ranks, timeout=timeout, group_desc=name),
            dist.group.WORLD,
        )

    @classmethod
    def imagined(cls, parallel: ParallelConfig, num_key_value_heads: int, world: int, rank: int) -> Grid:
        """The grid as it would be on a rank of a world that does not exist: for planning. Nothing can be sent over it."""
        return cls._of(parallel, num_key_value_heads, world, rank, lambda name, ranks: None)

    @classmethod
    def _of(
        cls,
        parallel: ParallelConfig,
        num_key_value_heads: int,
        world: int,
        me: int,
        make_group: Callable[[str, list[int]], dist.ProcessGroup | None],
        everyone: dist.ProcessGroup | None = None,
    ) -> Grid:
        pp, cp, tp = parallel.pipeline_parallel, parallel.context_parallel, parallel.tensor_parallel
        if world % (pp * cp * tp):
            raise ValueError(f"world size {world} is not divisible by pp {pp} * cp {cp} * tp {tp}")
        mesh = np.arange(world).reshape(pp, world // (pp * cp * tp), cp, tp)
        waits = Waits()

        def axis(name: str, rows: np.ndarray) -> Axis:
            """The axis whose rank sets are the rows; every rank creates every group, as torch requires."""
            mine = Axis(name, ranks=(me,), waits=waits)
            for ranks in rows.tolist():
                group = make_group(name, ranks) if len(ranks) > 1 else None
                if me in ranks:
                    mine = Axis(name, ranks.index(me), len(ranks), tuple(ranks), group, waits)
            return mine

        along: Callable[[int], np.ndarray] = lambda dim: np.moveaxis(mesh, dim, -1).reshape(-1, mesh.shape[dim])  # noqa: E731
        copies = max(1, tp // num_key_value_heads)
        ends = np.empty((0, 2), dtype=int) if parallel.folded else along(0)[:, [0, -1]]
        return cls(
            pp=axis("pp", along(0)),
            dp=axis("dp", along(1)),
            cp=axis("cp", along(2)),
            tp=axis("tp", along(3)),
            dp_cp=axis("dp_cp", np.moveaxis(mesh, 3, 1).reshape(pp * tp, -1)),
            world=Axis("world", me, world, tuple(range(world)), everyone if world > 1 else None, waits),
            kv_replica=axis("kv_replica", mesh.reshape(-1, copies)),
            tied=axis("tied", ends),
            pp_forward=axis("pp_forward", along(0)),
            pp_backward=axis("pp_backward", along(0)),
        )

    def traffic(self) -> dict[str, Traffic]:
        """What this rank has exchanged so far over every axis of more than one rank, as copies."""
        axes = (getattr(self, name) for name in self.__dataclass_fields__)
        return {axis.name: axis.traffic.copy() for axis in axes if axis.size > 1}
