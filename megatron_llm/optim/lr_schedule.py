"""The learning rate as a pure function of the number of the update, so that a resumed run needs no state for it.

Called by `training/step.py`.
"""

from __future__ import annotations

import math

from megatron_llm.config import LrScheduleConfig


def learning_rate(update: int, peak: float, schedule: LrScheduleConfig, steps: int) -> float:
    """Rate of update number `update` (from 1) of a run of `steps`.

    Linear warm-up reaches `peak` at update `warmup_steps`. `cosine` then falls to `min_lr` at `decay_steps` (the run's
    last step if unset) and stays there; `constant` stays at `peak`.
    """
    if update <= schedule.warmup_steps:
        return peak * update / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    end = schedule.decay_steps or steps
    progress = min(1.0, (update - schedule.warmup_steps) / max(1, end - schedule.warmup_steps))
    return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
