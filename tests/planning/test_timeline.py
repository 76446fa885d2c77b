"""Pictures show what the events say: pixels are looked at where a bar, a gap or a message must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megatron_llm.pipeline.schedules import NAMES, make_schedule
from megatron_llm.pipeline.simulate import Costs, simulate
from megatron_llm.pipeline.timeline import Event, Timeline
from megatron_llm.planning import timeline as pictures
from megatron_llm.planning.timeline import byte_unit, draw, held_over_time, time_unit

RGB = npt.NDArray[np.uint8]
HAND = Timeline(  # two ranks: F 0-1 and B 2-4 above, F 1-2 below with a message on the way, then nothing
    (0, 1),
    (Event(0, "F", 0, 0, 10, 11), Event(1, "send", 1, 0, 11, 11.5), Event(1, "F", 1, 0, 11.5, 12), Event(0, "B", 0, 0, 12, 14)),
)


def _image(path: Path) -> RGB:
    from matplotlib.image import imread

    return (np.asarray(imread(path))[:, :, :3] * 255).round().astype(np.uint8)


def _pixel(image: RGB, seconds: float, rank: int, strip: bool = False, longest: float = 4.0, lane: float = 0.42) -> str:
    """Colour at a time in a rank's lane, in the layout that the module documents: inches from the top left."""
    width = image.shape[1] / pictures.DPI - pictures.LEFT - pictures.RIGHT
    part = pictures.STRIP if strip else pictures.BAR
    x = pictures.LEFT + seconds / longest * width
    y = pictures.ABOVE + lane * (rank + part[0] + 0.15 * part[1])  # above the number
    return "#{:02X}{:02X}{:02X}".format(*image[round(y * pictures.DPI), round(x * pictures.DPI)])


def test_bars_gaps_and_messages_are_where_they_happened(tmp_path: Path) -> None:
    draw(tmp_path / "hand.png", "by hand", {"made": HAND})
    image = _image(tmp_path / "hand.png")
    forward, backward, message = pictures.COLOURS["F"], pictures.COLOURS["B"], pictures.COLOURS["send"]
    assert [_pixel(image, t, 0) for t in (0.1, 0.9, 1.1, 1.9, 2.1, 3.9)] == [forward] * 2 + [pictures.IDLE] * 2 + [backward] * 2
    assert [_pixel(image, t, 1) for t in (0.5, 1.4, 1.6, 1.9, 2.1, 3.9)] == [pictures.IDLE] * 2 + [forward] * 2 + [
        pictures.IDLE
    ] * 2
    assert [_pixel(image, t, 1, strip=True) for t in (0.9, 1.1, 1.4, 1.6)] == ["#FFFFFF", message, message, "#FFFFFF"]


def test_later_chunks_of_a_rank_are_lighter(tmp_path: Path) -> None:
    events = tuple(Event(0, "F", stage, 0, stage, stage + 1) for stage in range(4))
    draw(tmp_path / "chunks.png", "chunks", {"made": Timeline((0, 0, 0, 0), events)})
    image = _image(tmp_path / "chunks.png")
    brightness = [int(_pixel(image, t + 0.3, 0)[1:3], 16) for t in range(4)]
    assert brightness == sorted(brightness) and len(set(brightness)) == 4
    assert _pixel(image, 0.3, 0) == pictures.COLOURS["F"]


def test_two_timelines_share_one_time_scale(tmp_path: Path) -> None:
    """The second is half as long: its half of the page is neither work nor idle."""
    half = Timeline((0,), (Event(0, "F", 0, 0, 0.0, 2.0),))
    whole = Timeline((0,), (Event(0, "B", 0, 0, 0.0, 4.0),))
    draw(tmp_path / "both.png", "both", {"measured": whole, "simulated": half})
    image = _image(tmp_path / "both.png")
    below = (0.42 + pictures.BETWEEN) / 0.42  # lanes further down
    assert [_pixel(image, t, 0) for t in (0.1, 3.9)] == [pictures.COLOURS["B"]] * 2
    assert [_pixel(image, t, below) for t in (0.1, 1.9)] == [pictures.COLOURS["F"]] * 2  # type: ignore[arg-type]
    assert _pixel(image, 2.1, below) == "#FFFFFF"  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_memory_curves_peak_where_the_simulation_says(name: str) -> None:
    """The peak is counted twice: here over time, in `simulate` over the order of actions."""
    schedule = make_schedule(name, 4, 7, 2 if name in ("interleaved", "breadth_first") else 1)
    stages = len(schedule.placement)
    numbers = [tuple(1.0 + (7 * stage + k) % 5 for stage in range(stages)) for k in range(5)]
    costs = Costs(*numbers[:3], 0.25, numbers[3], tuple(x / 2 for x in numbers[4]))
    simulation = simulate(schedule, costs)
    curves = held_over_time(simulation.timeline, costs)
    assert tuple(curve.peak for curve in curves) == pytest.approx(simulation.peak_bytes)
    assert all(curve.bytes[-1] == pytest.approx(0) and list(curve.times) == sorted(curve.times) for curve in curves)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (4, 8), (64, 256)])
def test_any_size_is_drawn_with_memory(ranks: int, microbatches: int, tmp_path: Path) -> None:
    schedule = make_schedule("zb_h1", ranks, microbatches)
    costs = Costs.uniform(ranks, message=0.05)
    timeline = simulate(schedule, costs).timeline
    draw(tmp_path / "out.png", "a title", {"simulated": timeline}, held_over_time(timeline, costs))
    height, width, _ = _image(tmp_path / "out.png").shape
    assert pictures.WIDTH[0] * pictures.DPI <= width <= pictures.WIDTH[1] * pictures.DPI + 1 and height < 2200


def test_units_leave_few_digits() -> None:
    assert time_unit(5) == (1.0, "seconds") and time_unit(0.5)[1] == "milliseconds" and time_unit(1e-5)[1] == "microseconds"
    assert byte_unit(3 * 2**30) == (2**30, "GiB") and byte_unit(2000)[1] == "KiB" and byte_unit(5)[1] == "bytes"
