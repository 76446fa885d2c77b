"""Pictures of pipeline timelines: one lane a rank, what it does when, how long it idles, what it holds.

Called by `cli/plan.py` (simulated) and `training/trace.py` (measured above simulated). matplotlib is imported inside.

Colours are those of Okabe and Ito (2008), which colour-blind people can tell apart. A rank's first model chunk has the full
colour, later ones are lighter. Bars are actions, what is left grey is idle time, and the strip below a bar shows messages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_llm.pipeline.simulate import Costs
from megatron_llm.pipeline.timeline import Event, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"F": "#0072B2", "B": "#E69F00", "W": "#009E73", "send": "#CC79A7"}
NAMES = {"F": "forward", "B": "backward", "W": "weight gradient", "send": "message"}
IDLE = "#DEDEDE"
Colour = tuple[float, float, float]

# Sizes of the page in inches.
DPI = 150
WIDTH = 16.0, 24.0  # at least, and at most where many short actions need it
BAR_WIDTH = 14 / DPI  # of a typical action, which the page is widened for
LEFT, RIGHT, ABOVE, BELOW, BETWEEN, MEMORY = 0.95, 1.75, 0.95, 0.62, 0.66, 1.7
# Parts of a lane's height: from where, how much.
BAR, STRIP = (0.04, 0.70), (0.78, 0.15)
NUMBER = 4.5, 9.0  # points: smaller micro-batch numbers are left out
FORMATS = ("png", "pdf", "svg")
CURVES = 16  # more ranks than this: memory curves of some of them


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds over time: `bytes[i]` from `times[i]` (seconds) on, until `times[i + 1]`."""

    times: tuple[float, ...]
    bytes: tuple[float, ...]

    @property
    def peak(self) -> float:
        return max(self.bytes)


@dataclass(frozen=True)
class _Page:
    """The figure and its scales: `lane` inches a rank; `longest` in `unit`, which has `scale` to the second."""

    figure: Figure
    lane: float
    longest: float
    scale: float
    unit: str

    @property
    def width(self) -> float:
        """Inches of the time axis."""
        return float(self.figure.get_figwidth()) - LEFT - RIGHT

    def points(self, seconds: float) -> float:
        """Width of a duration in points, 1/72 inch."""
        return seconds * self.scale / self.longest * self.width * 72

    def axes(self, bottom: float, height: float) -> Axes:
        """Axes over the time axis's width; inches from below."""
        width, total = self.figure.get_size_inches()
        return self.figure.add_axes((LEFT / width, bottom / total, self.width / width, height / total))


def held_over_time(timeline: Timeline, costs: Costs) -> list[Held]:
    """What every rank holds over time, by the bytes of the costs: from the start of F to the end of B, less to the end of W."""
    split = any(event.kind == "W" for event in timeline.events)
    times: list[list[float]] = [[0.0] for _ in range(timeline.ranks)]
    values: list[list[float]] = [[0.0] for _ in range(timeline.ranks)]
    for event in sorted(timeline.events, key=lambda event: event.start):
        if event.kind == "send":
            continue
        first, second = costs.held_after_forward[event.stage], costs.held_after_backward[event.stage] * split
        change = {"F": first, "B": second - first, "W": -second}[event.kind]
        times[event.rank].append(event.start if event.kind == "F" else event.end)
        values[event.rank].append(values[event.rank][-1] + change)
    return [Held(tuple(of_rank), tuple(held)) for of_rank, held in zip(times, values, strict=True)]


def draw(path: str | Path, title: str, timelines: Mapping[str, Timeline], held: Sequence[Held] | None = None) -> None:
    """Write a picture, in the format of the suffix, with the timelines one above the other on one time scale.

    Raises ValueError if the path cannot be that of a picture, see `picture_format`.
    title: of the picture; the keys of `timelines` are theirs. held: of every rank, drawn below the last timeline.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = picture_format(path)
    ranks = max(timeline.ranks for timeline in timelines.values())
    longest = max(timeline.makespan for timeline in timelines.values())
    actions = [
        e.end - e.start for timeline in timelines.values() for e in timeline.events if e.kind != "send" and e.end > e.start
    ]
    lane = min(0.42, max(0.13, 8.0 / ranks))
    width = min(WIDTH[1], max(WIDTH[0], longest / float(np.median(actions)) * BAR_WIDTH))
    bottom = BELOW + (MEMORY + BETWEEN) * (held is not None)
    height = ABOVE + len(timelines) * (lane * ranks + BETWEEN) - BETWEEN + bottom
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    scale, unit = time_unit(longest)
    page = _Page(figure, lane, longest * scale, scale, unit)

    figure.text(LEFT / width, 1 - 0.3 / height, title, fontsize=15, fontweight="bold", va="center")
    _legend(page, [event.kind for timeline in timelines.values() for event in timeline.events])
    top = height - ABOVE
    for index, (name, timeline) in enumerate(timelines.items()):
        last = index == len(timelines) - 1
        axes = page.axes(top - lane * timeline.ranks, lane * timeline.ranks)
        axes.set_title(f"{name}: {_summary(timeline, page)}", loc="left", fontsize=10.5, pad=6)
        axes.set_xlabel(unit if last and held is None else "")
        _lanes(page, axes, timeline)
        _rank_figures(page, axes, timeline, held if last else None)
        top -= lane * ranks + BETWEEN
    if held is not None:
        _memory(page, page.axes(BELOW, MEMORY), held)
    figure.savefig(str(path), format=picture)


def picture_format(path: str | Path) -> str:
    """The format that the suffix of a picture's path names. Raises ValueError if it names none, or if the folder is missing."""
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise ValueError(f"{path}: a picture's name ends in {' or '.join(f'.{known}' for known in FORMATS)}")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{path}: No such folder as {Path(path).parent}; make it first")
    return suffix


def counted(number: int, noun: str) -> str:
    """A number of things: 1 rank, 4 ranks, 8 micro-batches."""
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def idle_share(total: float, busy: float) -> str:
    """Idle time, of `total` seconds of which `busy` are work, in % of the work: what table and picture call idle."""
    return f"{max(0.0, total / busy - 1):.1%}" if busy else "no work"


def byte_unit(largest: float) -> tuple[float, str]:
    """(bytes in the unit, its name) so that the largest of some sizes has few digits."""
    return next(
        ((size, name) for size, name in ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")) if largest >= size), (1, "bytes")
    )


def time_unit(seconds: float) -> tuple[float, str]:
    """(what to multiply seconds by, the unit that they are in then)."""
    units = ((1.0, "seconds"), (1e3, "milliseconds"), (1e6, "microseconds"))
    return next((unit for unit in units if seconds * unit[0] >= 2), units[-1])


def _summary(timeline: Timeline, page: _Page) -> str:
    seconds = timeline.makespan * page.scale
    step, span = f"{timeline.bubble_of_makespan:.1%}", f"{timeline.bubble_of_span:.1%}"
    bubbles = f"{step} in the step (busiest rank), {span} from its first action to its last (worst rank)"
    return f"{seconds:,.4g} {page.unit}, idle time in % of a rank's work: {bubbles}"


def _legend(page: _Page, kinds: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in COLOURS if kind in set(kinds)]
    patches.append(Patch(color=IDLE, label="idle (bubble)"))
    width, height = page.figure.get_size_inches()
    page.figure.legend(
        handles=patches, loc="center right", bbox_to_anchor=(1 - 0.2 / width, 1 - 0.3 / height), ncols=len(patches), frameon=False
    )  # fmt: skip


def _lanes(page: _Page, axes: Axes, timeline: Timeline) -> None:
    """The bars and strips of all ranks, with micro-batch numbers where they fit."""
    from matplotlib.collections import PolyCollection

    start = min(event.start for event in timeline.events)
    shades = _shades(timeline.placement)
    boxes: dict[Colour, list[tuple[float, float, float, float]]] = defaultdict(list)
    for event in timeline.events:
        part, height = STRIP if event.kind == "send" else BAR
        left, right = ((time - start) * page.scale for time in (event.start, event.end))
        boxes[shades[event.kind, event.stage]].append((left, right, event.rank - 0.5 + part, height))
    idle = [(0.0, timeline.makespan * page.scale, rank - 0.5 + BAR[0], BAR[1]) for rank in range(timeline.ranks)]
    axes.add_collection(PolyCollection(_corners(idle), facecolors=IDLE, edgecolors="none"))
    typical = float(np.median([event.end - event.start for event in timeline.events if event.kind != "send"]))
    line = 0.6 if page.points(typical) > 3 else 0.0
    for colour, of_colour in boxes.items():
        edge = {"edgecolors": "white", "linewidths": line} if line and of_colour[0][3] == BAR[1] else {"edgecolors": "none"}
        axes.add_collection(PolyCollection(_corners(of_colour), facecolors=[colour], **edge))
    _numbers(page, axes, [event for event in timeline.events if event.kind != "send"], start, shades)

    axes.set(xlim=(0, page.longest), ylim=(timeline.ranks - 0.5, -0.5))
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n * page.lane >= 0.2)
    shown = range(0, timeline.ranks, every)
    axes.set_yticks([rank - 0.5 + BAR[0] + BAR[1] / 2 for rank in shown], [f"rank {rank}" for rank in shown], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _corners(boxes: Sequence[tuple[float, float, float, float]]) -> Any:
    """(left, right, top, height) of n boxes -> their corners, [n, 4, 2]."""
    left, right, top, height = np.array(boxes).T
    return np.stack([np.stack(xy, -1) for xy in ((left, top), (right, top), (right, top + height), (left, top + height))], 1)


def _shades(placement: tuple[int, ...]) -> dict[tuple[str, int], Colour]:
    """The colour of every (kind, stage): the kind's, mixed with white by the stage's place among those of its rank."""
    from matplotlib.colors import to_rgb

    shades = {}
    for stage, rank in enumerate(placement):
        white = 0.55 * placement[:stage].count(rank) / max(1, placement.count(rank) - 1)
        for kind, name in COLOURS.items():
            mixed = 0.0 if kind == "send" else white
            red, green, blue = (channel + (1 - channel) * mixed for channel in to_rgb(name))
            shades[kind, stage] = (red, green, blue)
    return shades


def _numbers(page: _Page, axes: Axes, events: Sequence[Event], start: float, shades: Mapping[tuple[str, int], Colour]) -> None:
    """Micro-batch numbers, counted from 0 and all of one size, where bars are wide enough; else none."""
    digits = len(str(max(event.microbatch for event in events)))
    narrow = page.points(float(np.quantile([event.end - event.start for event in events], 0.1)))
    size = min(NUMBER[1], page.lane * BAR[1] * 72 * 0.62, narrow / (0.66 * digits))
    if size < NUMBER[0]:
        return
    for event in events:
        text = str(event.microbatch)
        if page.points(event.end - event.start) < 0.66 * size * len(text):
            continue
        red, green, blue = shades[event.kind, event.stage]
        axes.text(
            ((event.start + event.end) / 2 - start) * page.scale,
            event.rank - 0.5 + BAR[0] + BAR[1] / 2,
            text,
            ha="center",
            va="center_baseline",
            fontsize=size,
            color="white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black",
        )


def _rank_figures(page: _Page, axes: Axes, timeline: Timeline, held: Sequence[Held] | None) -> None:
    """Beside every lane: how long the rank idles in the step, in % of its work, and the most that it holds."""
    columns = [("idle, step", [idle_share(timeline.makespan, timeline.busy(rank)) for rank in range(timeline.ranks)])]
    if held is not None:
        divisor, unit = byte_unit(max(of_rank.peak for of_rank in held))
        columns.append((f"peak, {unit}", [f"{of_rank.peak / divisor:.3g}" for of_rank in held]))
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right"}
    for column, (head, values) in enumerate(columns):
        x = 1 + (0.62 + 0.85 * column) / page.width
        axes.text(x, -0.5 - 0.06 / page.lane, head, va="bottom", fontsize=9, color="0.35", **style)
        for rank, value in enumerate(values):
            axes.text(x, rank - 0.5 + BAR[0] + BAR[1] / 2, value, va="center", fontsize=min(9.0, page.lane * 72 * 0.7), **style)


def _memory(page: _Page, axes: Axes, held: Sequence[Held]) -> None:
    """What ranks hold over time, a line a rank; of many ranks some, spread evenly."""
    from matplotlib import colormaps

    divisor, name = byte_unit(max(of_rank.peak for of_rank in held))
    ranks = range(len(held)) if len(held) <= CURVES else np.linspace(0, len(held) - 1, CURVES // 2).round().astype(int).tolist()
    for rank in ranks:
        times, values = np.array(held[rank].times) * page.scale, np.array(held[rank].bytes) / divisor
        colour = colormaps["viridis"](0.92 * rank / max(1, len(held) - 1))
        axes.step(times, values, where="post", color=colour, linewidth=1.2, label=f"rank {rank}")
    axes.set(xlim=(0, page.longest), ylim=(0, None), xlabel=page.unit, ylabel=f"activations, {name}")
    axes.legend(
        loc="upper left", bbox_to_anchor=(1 + 0.05 / page.width, 1.06), frameon=False, fontsize=8, ncols=1 + (len(ranks) > 8),
        handlelength=1.0, columnspacing=0.6, labelspacing=0.25,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.92")
    axes.set_axisbelow(True)
