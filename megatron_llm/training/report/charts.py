"""Curves as pictures: scales, ticks and the paths of an SVG. Called by `report/page.py`.

A plot is 1,000 by 1,000 units and stretched by the browser; its labels are text of the page, placed in percent. So charts fit any
width without a script, and letters keep their size. `templates/report.js` draws the same again when a reader wants another axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_llm.training.report.curves import Curve
from megatron_llm.training.report.read import Values

SIZE = 1000  # units of a plot, both ways
_SPREAD = 100  # times the median: the greatest value of curves that are drawn on a logarithmic axis
_MARGIN = 0.04  # of the range is left free above and below


@dataclass(frozen=True)
class Line:
    """A curve in a chart: of which run, in which colour (a number)."""

    run: int
    colour: int
    curve: Curve


@dataclass(frozen=True)
class Chart:
    """What one picture shows.

    Attributes:
        unit: of the numbers on the axis, which are those of the curves divided by `divide`.
        zero: the axis begins at zero. log: it is logarithmic.
        marks: kinds of marks that are drawn in it.
    """

    id: str
    title: str
    unit: str
    lines: list[Line]
    marks: tuple[str, ...]
    divide: float = 1.0
    zero: bool = False
    log: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened after a step. `first` to `last`: what is drawn together as one."""

    run: int
    kind: str
    step: float
    tokens: float
    title: str


@dataclass(frozen=True)
class Drawing:
    """Positions from 0 to 100 from the left or the top, with labels; and the paths: (class, run, data)."""

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[tuple[str, int, str]]
    marks: list[tuple[float, Mark]] = field(default_factory=list)


def wants_log(lines: Iterable[Line]) -> bool:
    """Whether values are positive and some so much larger than most that nothing else would be seen on a linear axis."""
    found = [line.curve.high if line.curve.high is not None else line.curve.mid for line in lines]
    values = np.concatenate(found)[np.isfinite(np.concatenate(found))] if found else np.array([])
    return bool(len(values) and values.min() > 0 and values.max() > _SPREAD * np.median(values))


def x_range(charts: Sequence[Chart]) -> tuple[float, float]:
    """First and last step of all charts, which share their axis."""
    steps = [line.curve.axis.step for chart in charts for line in chart.lines]
    low, high = (min(float(s[0]) for s in steps), max(float(s[-1]) for s in steps)) if steps else (0.0, 1.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def draw(chart: Chart, xs: tuple[float, float], marks: Sequence[Mark]) -> Drawing:
    """The picture of a chart over the steps `xs`."""
    ys = _y_range(chart)
    y_scale = _Scale(*ys, chart.log)
    x_scale = _Scale(*xs, False)
    paths = [path for line in chart.lines for path in _paths(line, chart, x_scale, y_scale)]
    return Drawing(
        [(100 * x_scale(tick), number(tick)) for tick in ticks(*xs, whole=True)],
        [(100 - 100 * y_scale(tick), number(tick)) for tick in (log_ticks(*ys) if chart.log else ticks(*ys))],
        [*(path for path in paths if "band" in path[0]), *(path for path in paths if "band" not in path[0])],
        [(100 * x_scale(mark.step), mark) for mark in marks if mark.kind in chart.marks],
    )


@dataclass(frozen=True)
class _Scale:
    """From a number to its place, 0 to 1; nan for what has none."""

    low: float
    high: float
    log: bool

    def __call__(self, value: float) -> float:
        if self.log:
            return (math.log(value / self.low)) / math.log(self.high / self.low) if value > 0 else math.nan
        return (value - self.low) / (self.high - self.low)

    def all(self, values: Values) -> Values:
        if not self.log:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(invalid="ignore", divide="ignore"):
            positive = np.where(values > 0, values, np.nan)
            return np.log(positive / self.low) / math.log(self.high / self.low)


def _y_range(chart: Chart) -> tuple[float, float]:
    curves = [line.curve for line in chart.lines]
    found = [column for curve in curves for column in (curve.mid, curve.low, curve.high) if column is not None]
    values = np.concatenate(found) / chart.divide
    values = values[np.isfinite(values) & ((values > 0) | (not chart.log))]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if chart.log:
        low, high = (low, high) if low < high else (low / 2, high * 2)
        margin = (high / low) ** _MARGIN
        return low / margin, high * margin
    if chart.zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    margin = (high - low) * _MARGIN
    return (low if chart.zero and low == 0 else low - margin), high + margin


def _paths(line: Line, chart: Chart, x_scale: _Scale, y_scale: _Scale) -> list[tuple[str, int, str]]:
    """The path of a curve, one of its dots and one of the band from the least to the greatest value, as far as it has them."""
    curve, colour = line.curve, f"c{line.colour}"
    x = SIZE * x_scale.all(curve.axis.step)
    mid, low, high = (
        None if column is None else SIZE - SIZE * y_scale.all(column / chart.divide)
        for column in (curve.mid, curve.low, curve.high)
    )
    assert mid is not None
    paths = [(f"{curve.kind} {colour}", line.run, _polyline(x, mid))]
    if curve.kind == "dots" or np.isfinite(mid).sum() == 1:
        paths.append((f"dot {colour}", line.run, _dots(x, mid)))
    if low is not None and high is not None:
        paths.append((f"band {colour}", line.run, _band(x, low, high)))
    return paths


def _polyline(x: Values, y: Values) -> str:
    """With a gap wherever there is no number; a point between two gaps is a line of no length, a dot."""
    parts, pen = [], "M"
    for place, value in zip(x.tolist(), y.tolist(), strict=True):
        if value != value:
            pen = "M"
        else:
            parts.append(f"{pen}{place:.1f} {value:.1f}" + "h0" * (pen == "M"))
            pen = "L"
    return "".join(parts)


def _dots(x: Values, y: Values) -> str:
    return "".join(f"M{place:.1f} {value:.1f}h0" for place, value in zip(x.tolist(), y.tolist(), strict=True) if value == value)


def _band(x: Values, low: Values, high: Values) -> str:
    """Areas between two lines, one for each stretch without gaps."""
    known = np.isfinite(low) & np.isfinite(high)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(int)))
    areas = []
    for start, stop in edges.reshape(-1, 2):
        there = [f"{place:.1f} {value:.1f}" for place, value in zip(x[start:stop], high[start:stop], strict=True)]
        back = [f"{place:.1f} {value:.1f}" for place, value in zip(x[start:stop][::-1], low[start:stop][::-1], strict=True)]
        areas.append("M" + "L".join(there + back) + "Z")
    return "".join(areas)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """At most `count` + 1 round numbers, evenly spaced; integers if `whole`."""
    size = 10.0 ** math.floor(math.log10((high - low) / count))
    size *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= count)
    size = max(size, 1.0) if whole else size
    return [round(index * size, 12) for index in range(math.ceil(low / size), math.floor(high / size) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; if these are few, twice and five times them too; if these are few as well, round numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 6)
    for factors in ((1,), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers[::every] for factor in factors]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 3:
            return found
    return [tick for tick in ticks(low, high) if tick > 0]


def number(value: float) -> str:
    """A number as short as it can be read: 0.0003, 2.5, 1,500, 12k, 3.2M, 1e-5."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        return f"{value:.3g}".replace("e+", "e").replace("e-0", "e-")
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit and size >= 1e4:
            return f"{float(f'{value / unit:.4g}'):,g}{suffix}"
    return f"{float(f'{value:.4g}'):,g}"
