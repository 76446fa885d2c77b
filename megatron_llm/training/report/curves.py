"""Of any number of steps as many points as a screen can show, and honest ones. Called by `report/charts.py` and `report/page.py`.

Up to `POINTS` steps a curve has every value as it is in metrics.jsonl. Beyond, consecutive steps share a column, which keeps the
least, the mean and the greatest of their values: no spike is lost, and the page says how many steps a column has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_llm.training.report.read import Table, Values

POINTS = 1500  # in a curve: more than pixels in most charts
SMOOTHED = 0.05, 501  # of all steps are averaged in the smoothed loss, but at most so many, or those of three points
DOTS = 60  # more points than these would be one thick line


@dataclass(frozen=True, eq=False)
class Axis:
    """Where the points of curves are.

    Attributes:
        step, tokens: [points]; nan where the run does not say the tokens. steps_per_point: 1 if every step has a point.
    """

    step: Values
    tokens: Values
    steps_per_point: int


@dataclass(frozen=True)
class Curve:
    """A quantity over the steps, in the unit of metrics.jsonl.

    Attributes:
        key: name in metrics.jsonl. kind: how it is drawn: "line", "raw" (faint, behind its smoothed line), "dots" or "dashes".
        mid: [points]; nan where the run has no number. low, high: [points], None if every step has a point.
    """

    key: str
    label: str
    kind: str
    axis: Axis
    mid: Values
    low: Values | None = None
    high: Values | None = None


def axis(table: Table) -> Axis:
    """The points for the steps of a table."""
    size = max(1, -(-len(table.step) // POINTS))
    if size == 1:
        return Axis(table.step, table.tokens, 1)
    return Axis(_columns(table.step, size)[0], _columns(table.tokens, size)[0], size)


def curve(table: Table, along: Axis, key: str, label: str, kind: str = "line") -> Curve | None:
    """The curve of a column, None if it has no number at all. `along`: what `axis(table)` gives."""
    values = table.values.get(key)
    if values is None or not np.isfinite(values).any():
        return None
    if kind == "dots" and np.isfinite(values).sum() > DOTS:
        kind = "dashes"
    if along.steps_per_point == 1:
        return Curve(key, label, kind, along, values)
    return Curve(key, label, kind, along, *_columns(values, along.steps_per_point))


def smoothed(table: Table, along: Axis, key: str, label: str) -> Curve | None:
    """The mean of the `window(table)` steps around each; None if these are hardly more than one."""
    values, width = table.values.get(key), window(table)
    if values is None or width < 3 or not np.isfinite(values).any():
        return None
    mean = _moving_mean(values, width)
    if along.steps_per_point > 1:
        mean = _columns(mean, along.steps_per_point)[0]
    return Curve(f"{key} smoothed", label, "line", along, mean)


def window(table: Table) -> int:
    """Steps that the smoothed loss averages, an odd number."""
    part, most = SMOOTHED
    return int(min(len(table.step) * part, max(most, 3 * axis(table).steps_per_point))) // 2 * 2 + 1


def _moving_mean(values: Values, width: int) -> Values:
    """Of the `width` values around each, fewer at the ends, nan left out."""
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(column)]) for column in (np.where(known, values, 0.0), known.astype(float)))
    place = np.arange(len(values))
    start, stop = np.maximum(place - width // 2, 0), np.minimum(place + width // 2 + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Values = (sums[stop] - sums[start]) / (counts[stop] - counts[start])
    return mean


def _columns(values: Values, size: int) -> tuple[Values, Values, Values]:
    """Mean, least and greatest of every `size` consecutive values, nan left out; nan where there is no other."""
    padded = np.concatenate([values, np.full(-len(values) % size, np.nan)]).reshape(-1, size)
    known = np.isfinite(padded)
    counts = known.sum(axis=1)
    some = counts > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, padded, 0.0).sum(axis=1) / counts
    low, high = np.where(known, padded, np.inf).min(axis=1), np.where(known, padded, -np.inf).max(axis=1)
    return mean, np.where(some, low, np.nan), np.where(some, high, np.nan)
