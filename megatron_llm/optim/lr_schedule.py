"""The learning rate as a pure function of where the run stands, so that a resumed run needs no state for it.

Called by `training/step.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_llm.config import LrScheduleConfig

# What is left of the rate when a part of the decay is over. 1-sqrt: Haegele et al. 2024, arXiv 2405.18392.
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda part: 1.0 - part,
    "cosine": lambda part: 0.5 * (1.0 + math.cos(math.pi * part)),
    "1-sqrt": lambda part: 1.0 - math.sqrt(part),
}


def learning_rate(position: int, peak: float, schedule: LrScheduleConfig, end: int) -> float:
    """Rate of the update that brings the run to `position`, at least 1, of `end`; both in `schedule.unit`.

    A linear warm-up reaches `peak` at `schedule.warmup`. Then, down to the least rate that the schedule names:

    - constant stays at `peak`;
    - linear and cosine fall until `schedule.decay` (`end` if unset);
    - inverse_sqrt is peak * sqrt(warmup / position) (Vaswani et al. 2017);
    - wsd stays at `peak` and falls in the last `schedule.decay` (Hu et al. 2024, arXiv 2404.06395).

    At a restart all this begins anew with the position counted from there, but the warm-up starts at the rate reached
    (re-warming: Ibrahim et al. 2024, arXiv 2403.08763). For what came before, the restart was the end.
    """
    start, reached = 0, 0.0
    for restart in schedule.restarts:
        if position <= restart:
            end = restart
            break
        reached = _rate(restart - start, restart - start, reached, peak, schedule)
        start = restart
    return _rate(position - start, end - start, reached, peak, schedule)


def _rate(position: int, length: int, initial: float, peak: float, schedule: LrScheduleConfig) -> float:
    """The same between two restarts, `length` apart, with a warm-up from `initial`."""
    warmup, least = schedule.warmup, min_rate(schedule, peak)
    if position <= warmup:
        return initial + (peak - initial) * position / warmup
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "inverse_sqrt":
        return max(least, peak * math.sqrt(warmup / position))
    if schedule.kind == "wsd":
        assert schedule.decay is not None
        first, last, shape = max(warmup, length - schedule.decay), length, schedule.decay_shape or "1-sqrt"
    else:
        first, last, shape = warmup, schedule.decay or length, schedule.kind
    if position <= first:
        return peak
    return least + (peak - least) * _SHAPES[shape](min(1.0, (position - first) / max(1, last - first)))


def min_rate(schedule: LrScheduleConfig, peak: float) -> float:
    """The least rate after a warm-up."""
    return schedule.min_lr if schedule.min_lr_ratio is None else schedule.min_lr_ratio * peak
