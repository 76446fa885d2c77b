"""Schedules with two chunks a rank, placed in a V: rank r has stages r and 2p - 1 - r. Called by `pipeline/schedules.py`.

The first rank has the first and the last stage, so a micro-batch's backward starts where its forward started, and what a
rank holds of its two chunks adds up to the same on all ranks (Qi et al., arXiv 2401.10241 and 2405.15362).

V-Half and V-Min repeat a *building block*: when a micro-batch passes each stage, in ticks (F, B and W of one chunk take one
tick each), which repeats every six ticks for the next micro-batch. The slower the block runs through the ranks, the
longer activations live. The block is chosen so that no two passes of a rank ever fall on one tick. Repeating it leaves
gaps at both ends of the step, which list scheduling closes without holding more than before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain

from megatron_llm.pipeline.actions import Action, Kind
from megatron_llm.pipeline.check import dependencies

_PERIOD = 6  # ticks between two micro-batches: F, B and W of two chunks
_NEVER = 1 << 60
_KINDS: tuple[Kind, ...] = ("F", "B", "W")

Orders = list[list[Action]]


def zb_v(ranks: int, microbatches: int) -> Orders:
    """ZB-V: no rank is ever idle between its first and its last action if F, B and W take the same time.

    Made for at least 2p - 1 micro-batches; of fewer, the others are left out and the gaps closed.
    """
    enough = max(microbatches, 2 * ranks - 1)
    orders = [[action for action in _zb_v(rank, ranks, enough) if action.microbatch < microbatches] for rank in range(ranks)]
    return _improved(orders, ranks, microbatches)


def v_half(ranks: int, microbatches: int) -> Orders:
    """V-Half: about half of the activations of 1F1B."""
    gaps = (1, 1, 2) if ranks % 2 else (1, 4, 2)
    return _improved(_repeated((1, 2, 1, 2), gaps, ranks, microbatches), ranks, microbatches)


def v_min(ranks: int, microbatches: int) -> Orders:
    """V-Min: about a third of the activations of 1F1B. If F, B and W take different times, every micro-batch adds idle time."""
    gaps = (1, 1, 1) if ranks % 3 else (1, 3, 1)
    return _Graph(ranks, microbatches).squeeze(_repeated((1, 1, 1, 1), gaps, ranks, microbatches)).orders


def _zb_v(rank: int, ranks: int, microbatches: int) -> Iterator[Action]:
    """ZB-V for at least 2p - 1 micro-batches. The two chunks are 0 (on the way down) and 1."""
    counts: Counter[tuple[Kind, int]] = Counter()

    def do(kind: Kind, chunk: int) -> Iterator[Action]:
        """The next micro-batch of a kind, if one is left."""
        if counts[kind, chunk] < microbatches:
            yield Action(kind, 2 * ranks - 1 - rank if chunk else rank, counts[kind, chunk])
            counts[kind, chunk] += 1

    for _ in range(2 * (ranks - rank) - 1):
        yield from do("F", 0)
    for _ in range(rank):
        yield from chain(do("F", 1), do("F", 0))
    for _ in range(ranks - rank):
        yield from chain(do("F", 1), do("B", 1), do("W", 1))
    while counts["F", 1] < microbatches:
        yield from chain(do("F", 0), do("B", 0), do("W", 0), do("F", 1), do("B", 1), do("W", 1))
    for _ in range(rank):
        yield from chain(do("B", 0), do("B", 1))
    for _ in range(ranks - rank):
        yield from chain(do("B", 0), do("W", 0))
    for chunk in (1, 0):
        while counts["W", chunk] < microbatches:
            yield from do("W", chunk)


def _repeated(offsets: tuple[int, int, int, int], gaps: tuple[int, int, int], ranks: int, microbatches: int) -> Orders:
    """Every rank's order if micro-batch i runs through the building block i periods after the first.

    offsets: ticks from rank to rank on the four ways: F down the V, F up, B down, B up. gaps: ticks from the end of one way
    to the start of the next. W follows its B on the first tick of the period that is free on its rank.
    """
    down, up, back, home = offsets
    last = ranks - 1
    turn = down * last + gaps[0]  # F of chunk 1 on the last rank
    back_start = turn + up * last + gaps[1]  # B of chunk 1 on the first rank
    home_start = back_start + back * last + gaps[2]  # B of chunk 0 on the last rank
    orders = []
    for rank in range(ranks):
        after = last - rank
        stages = (rank, 2 * ranks - 1 - rank)
        ticks: dict[tuple[Kind, int], int] = {
            ("F", stages[0]): down * rank,
            ("F", stages[1]): turn + up * after,
            ("B", stages[1]): back_start + back * rank,
            ("B", stages[0]): home_start + home * after,
        }
        taken = {tick % _PERIOD for tick in ticks.values()}
        assert len(taken) == len(ticks), (offsets, gaps, ranks, rank)
        for stage in reversed(stages):
            tick = next(t for t in range(ticks["B", stage] + 1, _NEVER) if t % _PERIOD not in taken)
            taken.add(tick % _PERIOD)
            ticks["W", stage] = tick
        passes = sorted(
            (tick + _PERIOD * mb, Action(kind, stage, mb)) for (kind, stage), tick in ticks.items() for mb in range(microbatches)
        )
        orders.append([action for _, action in passes])
    return orders


def _improved(orders: Orders, ranks: int, microbatches: int) -> Orders:
    """Close gaps forwards in time, then backwards as well if that makes the step, or else the longest span of a rank, shorter.

    Scheduling to and fro is the forward-backward improvement of Tormos and Lova (2001).
    """
    graph = _Graph(ranks, microbatches)
    forth = graph.squeeze(orders)
    back = graph.squeeze(forth.orders, backwards=True)
    return min(forth, back, key=lambda result: (result.makespan, result.span)).orders


@dataclass(frozen=True)
class _Squeezed:
    """Orders, the ticks from the first start to the last end, and the most of those of one rank."""

    orders: Orders
    makespan: int
    span: int


class _Graph:
    """All actions of a step by number: a *row* of numbers, one per micro-batch, for every kind and stage.

    So what an action waits for is a fixed distance away, which depends on its row alone.
    """

    def __init__(self, ranks: int, microbatches: int):
        self.microbatches, stages = microbatches, 2 * ranks
        self.rows = [(kind, stage) for kind in _KINDS for stage in range(stages)]
        self.ranks = [min(stage, stages - 1 - stage) for _, stage in self.rows]
        numbers = {row: number for number, row in enumerate(self.rows)}
        self.before: list[list[int]] = [[] for _ in self.rows]  # the rows that a row waits for, and the other way round
        self.after: list[list[int]] = [[] for _ in self.rows]
        for number, (kind, stage) in enumerate(self.rows):
            for needed in dependencies(Action(kind, stage, 0), stages):
                self.before[number].append(numbers[needed.kind, needed.stage])
                self.after[numbers[needed.kind, needed.stage]].append(number)

    def squeeze(self, orders: Orders, backwards: bool = False) -> _Squeezed:
        """List scheduling in unit time: a rank whose next action must wait does the first later one that need not.

        No rank's memory grows beyond the most that any rank holds with the given orders. backwards: with time reversed, so
        that a W begins what its F ends.
        """
        direction = -1 if backwards else 1
        before, after = (self.after, self.before) if backwards else (self.before, self.after)
        distances = [[(other - row) * self.microbatches for other in rows] for row, rows in enumerate(before)]
        wakes = [[self.ranks[row], *(self.ranks[other] for other in rows)] for row, rows in enumerate(after)]
        gains = [direction * {"F": 1, "B": 0, "W": -1}[kind] for kind, _ in self.rows]
        first = {row: number * self.microbatches for number, row in enumerate(self.rows)}
        queues = [
            _Queue([first[kind, stage] + mb for kind, stage, mb in order[::direction]], self.microbatches, distances, gains)
            for order in orders
        ]
        limit = max(queue.peak() for queue in queues)
        end = [_NEVER] * (len(self.rows) * self.microbatches)  # the tick after which an action is finished
        awake, now = set(range(len(orders))), 0
        while awake:  # ranks for which something has changed since they last found nothing to do
            woken: set[int] = set()
            for rank in awake:
                number = queues[rank].take(end, now, limit)
                if number is not None:
                    woken.update(wakes[number // self.microbatches])
            awake, now = woken, now + 1
        assert _NEVER not in end
        done = [[Action(*self.rows[n // self.microbatches], n % self.microbatches) for n in q.done[::direction]] for q in queues]
        return _Squeezed(done, max(end), max(end[queue.done[-1]] - end[queue.done[0]] + 1 for queue in queues))


class _Queue:
    """What one rank has yet to do, first things first, and what it has done. Arguments: see `_Graph.squeeze`."""

    def __init__(self, numbers: list[int], microbatches: int, distances: list[list[int]], gains: list[int]):
        self.numbers, self.microbatches, self.distances, self.gains = numbers, microbatches, distances, gains
        self.position = 0  # everything before is done
        self.held = 0
        self.done: list[int] = []

    def peak(self) -> int:
        """The most that is held if everything is done in the order of the queue."""
        return max(accumulate(self.gains[number // self.microbatches] for number in self.numbers))

    def take(self, end: list[int], now: int, limit: int) -> int | None:
        """Do the first action that need not wait and that leaves room for those it overtakes; None if there is none."""
        numbers = self.numbers
        while self.position < len(numbers) and end[numbers[self.position]] != _NEVER:
            self.position += 1
        held = peak = self.held
        waiting = set()
        for index in range(self.position, len(numbers)):
            number = numbers[index]
            if end[number] != _NEVER:
                continue
            row = number // self.microbatches
            gain = self.gains[row]
            if row not in waiting and peak + gain <= limit:
                for distance in self.distances[row]:
                    if end[number + distance] > now:
                        break
                else:
                    end[number] = now + 1
                    self.held += gain
                    self.done.append(number)
                    return number
            waiting.add(row)
            if len(waiting) == _PERIOD:  # the next micro-batch of every kind and chunk must wait
                return None
            held += gain
            peak = max(peak, held)
        return None
