"""Pipeline schedules as data: per rank, the list of things it does in a step, in order.

A schedule knows nothing of tensors: the same lists are checked (`pipeline/check.py`), simulated (`pipeline/simulate.py`)
and executed (`pipeline/runtime.py`). Called by `training/build.py` and by the planning command.

p ranks, m micro-batches, v chunks of the model a rank; F, B, W: times of one micro-batch on all chunks of a rank; A: the
activations of one micro-batch on all chunks of a rank. With at least 2p - 1 micro-batches (a multiple of p if interleaved):

| schedule      | idle time of a rank in its span | most activations of a rank       | published in                       |
|---------------|---------------------------------|----------------------------------|------------------------------------|
| gpipe         | (p - 1)(F + B + W)              | m A                              | Huang et al. 2019                  |
| 1f1b          | (p - 1)(F + B + W)              | p A                              | Narayanan et al. 2021              |
| interleaved   | (p - 1)(F + B + W) / v          | (p + (p - 1) / v) A              | Narayanan et al. 2021              |
| breadth_first | (p - 1)(F + B + W) / v          | m A                              | Lamy-Poirier 2022, arXiv 2211.05953|
| zb_h1         | (p - 1)(F + B - W)              | p A                              | Qi et al. 2023, arXiv 2401.10241   |
| zb_h2         | (p - 1)(F + B - 2W)             | (2p - 1) A                       | Qi et al. 2023, arXiv 2401.10241   |
| zb_v          | 0 if F = B = W                  | p A                              | Qi et al. 2023, arXiv 2401.10241   |
| v_half        | about (p - 1)(F + B + W) / 2    | floor((p + 2) / 2) A             | Qi et al. 2024, arXiv 2405.15362   |
| v_min         | about (p - 1)(F + B + W) 2 / 3  | floor((p + 4) / 3) A             | Qi et al. 2024, arXiv 2405.15362   |

With a step that ends for all ranks at once (clipping by the global norm), every rank is also idle until the first
micro-batch comes and after it has finished: for the zero-bubble schedules add (p - 1) F / v.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_llm.pipeline.actions import Action, Kind, Schedule
from megatron_llm.pipeline.v_shaped import v_half, v_min, zb_v

__all__ = ["NAMES", "Action", "Kind", "Schedule", "forward_only", "make_schedule", "placement"]

_V_SHAPED = {"zb_v": zb_v, "v_half": v_half, "v_min": v_min}
_LOOPED = ("interleaved", "breadth_first")
NAMES = ("gpipe", "1f1b", "interleaved", "breadth_first", "zb_h1", "zb_h2", "zb_v", "v_half", "v_min")


def placement(name: str, ranks: int, virtual_stages: int = 1) -> tuple[int, ...]:
    """The rank of every stage: in a loop (0, 1, 2, 0, 1, 2), or in a V (0, 1, 2, 2, 1, 0), which has two chunks a rank.

    Raises ValueError if there is no schedule of that name or it cannot have that many virtual stages.
    """
    if name not in NAMES:
        raise ValueError(f"there is no pipeline schedule {name!r}; the schedules are {', '.join(NAMES)}")
    if ranks < 1 or virtual_stages < 1:
        raise ValueError(f"a pipeline of {ranks} ranks with {virtual_stages} virtual stages is impossible; both start at 1")
    if name in _V_SHAPED:
        if virtual_stages > 2:
            raise ValueError(
                f"schedule {name} always has 2 virtual stages, not {virtual_stages}: leave virtual_stages out, or use interleaved"
            )
        return (*range(ranks), *reversed(range(ranks)))
    if virtual_stages > 1 and name not in _LOOPED:
        looped = {"gpipe": "breadth_first", "1f1b": "interleaved"}.get(name, " or ".join(_LOOPED))
        raise ValueError(
            f"schedule {name} has 1 virtual stage, not {virtual_stages}: set virtual_stages to 1, or the schedule to {looped}"
        )
    return tuple(range(ranks)) * virtual_stages


def make_schedule(name: str, ranks: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """The training schedule of that name, for any number of micro-batches, fewer than ranks too.

    virtual_stages: model chunks a rank. Raises ValueError for what cannot be, see `placement`.
    """
    owners = placement(name, ranks, virtual_stages)
    if microbatches < 1:
        raise ValueError(f"a schedule of {microbatches} micro-batches is impossible; there must be at least 1")
    rows: Iterable[Iterable[Action]]
    if name in _V_SHAPED:
        rows = _V_SHAPED[name](ranks, microbatches)
    elif name in ("zb_h1", "zb_h2"):
        rows = _handcrafted(ranks, microbatches, 1 if name == "zb_h1" else 2)
    elif name in ("gpipe", "breadth_first"):
        rows = (_breadth_first(rank, ranks, microbatches, virtual_stages) for rank in range(ranks))
    else:
        rows = (_interleaved(rank, ranks, microbatches, virtual_stages) for rank in range(ranks))
    return Schedule(owners, microbatches, tuple(map(tuple, rows)))


def forward_only(placement: tuple[int, ...], microbatches: int) -> Schedule:
    """Forwards alone, for evaluation. At every unit of time each rank does the last of its stages that has work.

    Nothing is held for a backward, so the lists are those of ranks that are never idle while there is work; a rank that
    took a micro-batch through all its stages before the next one would wait for the rest of the pipeline every time.
    """
    owned = [[stage for stage, owner in enumerate(placement) if owner == rank] for rank in range(max(placement) + 1)]
    rows: list[list[Action]] = [[] for _ in owned]
    arrived = [microbatches] + [0] * len(placement)  # micro-batches that are through the stage before; the end is the last
    while arrived[-1] < microbatches:
        before = tuple(arrived)
        for row, stages in zip(rows, owned, strict=True):
            stage = max((stage for stage in stages if before[stage + 1] < before[stage]), default=None)
            if stage is not None:
                row.append(Action("F", stage, before[stage + 1]))
                arrived[stage + 1] += 1
    return Schedule(placement, microbatches, tuple(map(tuple, rows)))


def _breadth_first(rank: int, ranks: int, microbatches: int, chunks: int) -> list[Action]:
    """All micro-batches through one chunk after the other, then all backward. With one chunk this is GPipe."""
    stages = range(rank, ranks * chunks, ranks)
    forwards = [Action("F", stage, mb) for stage in stages for mb in range(microbatches)]
    return forwards + [Action("B", stage, mb) for stage in reversed(stages) for mb in range(microbatches)]


def _interleaved(rank: int, ranks: int, microbatches: int, chunks: int) -> list[Action]:
    """Warm-up forwards, then one forward and one backward in turn, then the other backwards. With one chunk this is 1F1B.

    Micro-batches go through the chunks in groups of `ranks`. For a number that is no multiple the schedule is made for the
    next multiple, and the micro-batches too many are left out: no other micro-batch depends on them.
    """
    stages = range(rank, ranks * chunks, ranks)
    groups = [range(first, first + ranks) for first in range(0, microbatches, ranks)]
    forwards = [Action("F", stage, mb) for group in groups for stage in stages for mb in group]
    backwards = [Action("B", stage, mb) for group in groups for stage in reversed(stages) for mb in group]
    after = ranks - rank - 1  # the ranks behind this one
    warmup = min(after if chunks == 1 else 2 * after + (chunks - 1) * ranks, len(forwards))
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    order = forwards[:warmup] + steady + backwards[len(forwards) - warmup :]
    return [action for action in order if action.microbatch < microbatches]


def _handcrafted(ranks: int, microbatches: int, factor: int) -> list[list[Action]]:
    """ZB-H1 (factor 1) and ZB-H2 (factor 2): 1F1B with `factor` times its warm-up, and every W put off.

    A rank that warms up with fewer forwards puts its weight gradients off for so many more micro-batches, so that all
    ranks hold as much: `spare` + 1 micro-batches. What is put off fills the time in which the last gradients travel.
    With fewer micro-batches than ZB-H2 warms up with, the factor is what they allow.
    """
    spare = min(factor * (ranks - 1), max(ranks - 1, microbatches - 1))
    rows = []
    for rank in range(ranks):
        warmup = spare * (ranks - 1 - rank) // max(ranks - 1, 1)
        order = [Action("F", rank, mb) for mb in range(min(warmup, microbatches))]
        for mb in range(microbatches):
            if warmup + mb < microbatches:
                order.append(Action("F", rank, warmup + mb))
            order.append(Action("B", rank, mb))
            if mb >= spare - warmup:
                order.append(Action("W", rank, mb - (spare - warmup)))
        done = max(0, microbatches - (spare - warmup))
        rows.append(order + [Action("W", rank, mb) for mb in range(done, microbatches)])
    return rows
