"""The factor on the loss that keeps small float16 gradients above zero (Micikevicius et al. 2018, arXiv 1710.03740).

Its sequence is that of `torch.amp.GradScaler`, as pure functions, so that the factor is two numbers of the run's state and a
resumed run goes on with it. Called by `training/step.py`.
"""

from __future__ import annotations

from megatron_llm.config import PrecisionConfig

INITIAL_LOSS_SCALE = 2.0**12  # GradScaler starts at 2^16, but for means over tokens; our losses are sums
_LEAST = 2.0**-24  # of float16 numbers: what does not fit below that is not saved by a smaller factor


def loss_scale(precision: PrecisionConfig, dynamic: float) -> float:
    """The factor of the next step: 1 unless in float16; `dynamic` is where the run's own factor stands."""
    if precision.compute != "float16":
        return 1.0
    return dynamic if precision.loss_scale == "dynamic" else precision.loss_scale


def next_loss_scale(scale: float, finite_in_a_row: int, finite: bool, window: int) -> tuple[float, int]:
    """(factor, finite steps since it changed) after a step with the factor `scale`.

    Halved if the step's numbers were not finite, else doubled when `window` steps in a row were.
    """
    if not finite:
        return max(_LEAST, scale / 2), 0
    if finite_in_a_row + 1 == window:
        return scale * 2, 0
    return scale, finite_in_a_row + 1
