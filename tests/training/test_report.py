"""`megatron-llm report`: a page that says what the run folder says, whatever is in it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from megatron_llm.cli.main import main
from megatron_llm.config import CheckpointConfig, parse_config
from megatron_llm.training import loop
from megatron_llm.training.report.charts import log_ticks, number, ticks
from megatron_llm.training.report.curves import POINTS, axis, curve
from megatron_llm.training.report.read import read_run
from megatron_llm.training.run_folder import RunFolder
from tests.browser import CHROMIUM, Page, browser
from tests.launch import KILLED, launch
from tests.test_readme import run_commands
from tests.training.commands import read_metrics, write_config
from tests.training.planted import PlantedStream
from tests.training.test_rollback import raw_config, write_rows

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def line(step: int, **values: Any) -> dict[str, Any]:
    """A line of metrics as a run writes it."""
    return {
        "step": step, "loss": 5.0 / (step + 1) + 0.1234567890123, "grad_norm": 1.0 + step % 3, "lr": 1e-3 / step, "rows": 8,
        "tokens": 128 * step, "tokens_per_second": 1000.5 + step, "tflops_per_device": 0.25, "mfu": None, "step_seconds": 0.5,
        "memory_peak_bytes": 2**30 + step, "skipped": False, "skipped_steps": 0, **values,
    }  # fmt: skip


def make_run(folder: Path, lines: list[dict[str, Any]], tail: str = "", **files: Any) -> Path:
    """A run folder. files: `status`, `config`, `starts`, `samples`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + tail, encoding="utf-8")
    (folder / "status.json").write_text(json.dumps(files.get("status", {"outcome": "done", "step": len(lines)})))
    (folder / "config.yaml").write_text(yaml.safe_dump(files.get("config", {"training": {"steps": len(lines)}})))
    for name in ("starts", "samples"):
        if name in files:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in files[name]))
    return folder


class Reader(HTMLParser):
    """What a browser makes of a page: its text, its elements with their attributes, the embedded data."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._raw, self._scripts = "", "", []  # type: ignore[var-annotated]
        self.feed(source)
        self.close()
        self.data = json.loads(self._scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if self._raw == "script":
            self._scripts.append(data)
        elif not self._raw:
            self.text += data

    def classes(self, *wanted: str) -> list[dict[str, str | None]]:
        """The attributes of the elements with all of these classes."""
        return [attrs for _, attrs in self.elements if set(wanted) <= set((attrs.get("class") or "").split())]

    def curve(self, chart: str, key: str, run: int = 0) -> tuple[list[float], list[float | None], list[float | None]]:
        """(steps, tokens, values) of a curve in the embedded data."""
        found = [c for c in self.data["charts"][chart]["curves"] if (c["run"], c["key"]) == (run, key)]
        along = self.data["axes"][found[0]["axis"]]
        return along["step"], along["tokens"], found[0]["values"]


def report(tmp_path: Path, *paths: Path | str) -> Reader:
    output = tmp_path / "report.html"
    assert main(["report", *map(str, paths), "--output", str(output)]) == 0
    return Reader(output.read_text(encoding="utf-8"))


CHARTS = {
    "lr": "lr",
    "grad-norm": "grad_norm",
    "tokens-per-second": "tokens_per_second",
    "tflops": "tflops_per_device",
    "memory": "memory_peak_bytes",
}


def test_the_page_has_the_numbers_of_the_metrics(tmp_path: Path) -> None:
    lines = [{"step": 0, "tokens": 0, "valid_loss": 9.5, "valid_accuracy": 0.0}]
    lines += [
        line(step, **({"valid_loss": 9.0 / step, "valid_accuracy": step / 100} if step % 20 == 0 else {}))
        for step in range(1, 101)
    ]
    lines[50]["loss"], lines[50]["grad_norm"], lines[50]["skipped"] = None, None, True
    lines[30]["busy_seconds/max"], lines[60]["busy_seconds/max"] = 0.75, 0.5
    page = report(tmp_path, make_run(tmp_path / "run", lines))
    steps, tokens, losses = page.curve("loss", "loss")
    assert (steps, tokens) == (list(range(1, 101)), [128 * step for step in steps])
    assert losses == [each["loss"] for each in lines[1:]] and losses[49] is None
    for chart, key in CHARTS.items():
        assert page.curve(chart, key)[2] == [each[key] for each in lines[1:]], chart
    assert page.curve("loss", "valid_loss")[::2] == (
        [0, 20, 40, 60, 80, 100],
        [9.5, *(9.0 / step for step in range(20, 101, 20))],
    )
    assert page.curve("busy", "busy_seconds/max")[::2] == ([30, 60], [0.75, 0.5])
    assert "mfu" not in page.data["charts"] and "loss-scale" not in page.data["charts"]

    smooth = page.curve("loss", "loss smoothed")[2]
    around = [each["loss"] for each in lines[1:]]
    expected = [np.mean([v for v in around[max(0, i - 2) : i + 3] if v is not None]) for i in range(100)]
    assert smooth == pytest.approx(expected, rel=1e-5) and "mean of 5 steps" in page.text
    assert f"{lines[-1]['loss']:.4f}" in page.text and "12.8k" in page.text


def test_a_path_is_where_its_numbers_are(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "run", [line(step, lr=value) for step, value in ((1, 0.0), (2, 1.0), (3, 0.5))]))
    path = next(attrs["d"] for attrs in page.classes("line", "c0") if "0.0 1000.0" in (attrs["d"] or ""))
    top = 1000 - 1000 / 1.04  # 4 % are free above
    assert path == f"M0.0 1000.0h0L500.0 {top:.1f}L1000.0 {1000 - 500 / 1.04:.1f}"


def test_skipped_steps_going_back_restarts_and_stalls_are_marked(tmp_path: Path) -> None:
    lines = [
        line(step, skipped=step in (5, 6), **({"checkpoint_stall_seconds": 1.5} if step == 8 else {})) for step in range(1, 13)
    ]
    lines.insert(9, {"step": 11, "back_to_step": 9, "skipped_rows": [[72, 88]]})
    first = {"step": 0, "time": 1.8e9, "world_size": 4, "layout": {"tp": 2, "pp": 2, "cp": 1, "dp": 1}, "device": "NVIDIA H100"}
    again = first | {"step": 6, "world_size": 2, "layout": {"tp": 1, "pp": 1, "cp": 1, "dp": 2}, "before": {"outcome": "running"}}
    aside = first | {"step": 3, "before": {"outcome": "done"}, "world_size": 77}
    run = make_run(tmp_path / "run", lines, starts=[first, aside, first, again])
    page = report(tmp_path, run)
    marks = {mark["kind"]: (mark["step"], mark["tokens"]) for mark in page.data["marks"]}
    assert marks == {"skipped": (5, 640), "rollback": (9, 1152), "start": (6, 768), "stall": (8, 1024)}
    place = next(attrs["style"] for attrs in page.classes("mark", "start"))
    assert place == f"left:{100 * 5 / 11:.2f}%"
    assert "4 ranks: TP2 × PP2 → 2 ranks: DP2); before: killed" in page.text and "77" not in page.text
    assert "2 steps in a row without an update" in page.text and "back from step 11 to step 9" in page.text
    assert "Checkpoints stopped training 1 times, 1.5 s in all" in page.text
    hours = (6 * 4 + 6 * 2) * 0.5 / 3600
    assert re.search(rf"GPU-hours\s*{hours:.3g}\b", page.text)


def test_texts_of_a_run_are_shown_and_never_executed(tmp_path: Path) -> None:
    evil = "</script><script>document.title = 'owned'</script><img src=x onerror=alert(1)> & \u2028 ünï ☃ \ud83d {{ 7 * 7 }}"
    name = "<b>&'\"ünï"
    lines = [line(1), line(2, **{f"valid_loss/{evil}": 1.0, "valid_loss": 1.0, "valid_loss/b": 2.0})]
    run = make_run(
        tmp_path / name, lines, samples=[{"step": 2, "prompt": evil, "reply": evil, "ended": True}],
        status={"outcome": "failed", "reason": evil}, config={"data": {"train": [{"path": evil}]}},
    )  # fmt: skip
    page = report(tmp_path, run)
    assert page.text.count(evil.replace("\ud83d", "?")) >= 4 and name in page.text
    assert [tag for tag, _ in page.elements].count("script") == 2 and "img" not in [tag for tag, _ in page.elements]
    assert page.data["runs"] == [name]
    several = report(tmp_path, run, make_run(tmp_path / "other", lines))
    assert [tag for tag, _ in several.elements].count("script") == 2 and name in several.text


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"outcome": "failed", "reason": "rank 3: ValueError: <no>"}, ["failed", "rank 3: ValueError: <no>"]),
        ({"outcome": "stopped", "reason": "SIGUSR1", "step": 3}, ["stopped", "SIGUSR1"]),
        ({"outcome": "running"}, ["running", "about 48 s left"]),
        ({"outcome": "done", "step": 3, "changes": ["optimizer.lr: 1 -> 2"]}, ["done", "optimizer.lr: 1 -> 2"]),
    ],
)
def test_the_outcome_and_its_reason(tmp_path: Path, status: dict[str, Any], expected: list[str]) -> None:
    config = {"training": {"steps": 100}}
    page = report(tmp_path, make_run(tmp_path / "run", [line(step) for step in range(1, 5)], status=status, config=config))
    assert all(text in page.text for text in expected)


def test_a_run_that_says_running_and_has_long_been_silent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [line(1)], status={"outcome": "running"})
    os.utime(run / "metrics.jsonl", (time.time() - 7200,) * 2)
    assert "no sign of life" not in report(tmp_path, run).text, "it has just been started again, and loads its weights"
    os.utime(run / "status.json", (time.time() - 7200,) * 2)
    assert "no sign of life" in report(tmp_path, run).text
    (run / "metrics.jsonl").unlink()
    assert "no sign of life" in report(tmp_path, run).text, "killed before its first step"


@pytest.mark.parametrize(
    "lines", [[], [line(1)], [{"step": 0, "tokens": 0, "valid_loss": 3.0}], [line(1, loss=None, grad_norm=None)]]
)
def test_runs_that_have_hardly_begun(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    page = report(tmp_path, make_run(tmp_path / "run", lines, status={"outcome": "failed", "reason": "no such data"}))
    assert "no such data" in page.text and ("No step has been taken yet" in page.text) is (not lines)
    if lines and lines[0].get("loss"):
        assert any((attrs["d"] or "").startswith("M500.0 ") for attrs in page.classes("dot"))


def test_a_run_that_failed_before_its_first_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], status={"outcome": "failed", "reason": "out of memory"})
    (run / "metrics.jsonl").unlink()
    assert "out of memory" in report(tmp_path, run).text


def test_lines_that_are_torn_or_strange_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line(1), line(2, loss=float("nan"), grad_norm=float("inf"), lr="0.1"), line(3)]
    run = make_run(tmp_path / "run", lines, tail='[1]\n{"step": 4, "loss": 2.')
    (run / "config.yaml").write_text("model: [")
    page = report(tmp_path, run)
    assert page.curve("loss", "loss")[2] == [lines[0]["loss"], None, lines[2]["loss"]]
    assert page.curve("lr", "lr")[2][1] is None and page.curve("grad-norm", "grad_norm")[2][1] is None
    assert "2 lines of metrics.jsonl could not be read" in page.text and "config.yaml could not be read" in page.text
    assert "2 lines of metrics.jsonl" in capsys.readouterr().out


def test_a_step_that_is_there_twice_counts_as_it_was_taken_last(tmp_path: Path) -> None:
    lines = [line(1), line(2), line(3), line(2, loss=1.5), {"step": 2, "tokens": 256, "valid_loss": 1.25}]
    page = report(tmp_path, make_run(tmp_path / "run", lines))
    assert page.curve("loss", "loss")[::2] == ([1, 2], [lines[0]["loss"], 1.5])
    assert page.curve("loss", "valid_loss")[::2] == ([2], [1.25])


def test_several_runs_are_compared(tmp_path: Path) -> None:
    config = {
        "model": {"hidden_size": 8},
        "optimizer": {"lr": 1e-3},
        "logging": {"run_dir": "a"},
        "training": {"loss_spike": None},
    }
    other = config | {"optimizer": {"lr": 2e-3}, "logging": {"run_dir": "b"}}
    a = make_run(tmp_path / "x/run", [line(step) for step in range(1, 4)], config=config)
    b = make_run(tmp_path / "y/run", [line(step, tokens=1000 * step) for step in range(1, 9)], config=other)
    page = report(tmp_path, a, b / "metrics.jsonl", a, f"{b}/")
    assert page.data["runs"] == ["x/run", "y/run"] and page.data["x"] == [1, 8]
    assert page.curve("loss", "loss", 1)[1] == [1000 * step for step in range(1, 9)]
    assert {(curve["run"], curve["colour"]) for curve in page.data["charts"]["lr"]["curves"]} == {(0, 0), (1, 1)}
    assert "optimizer.lr" in page.text and "0.001" in page.text and "0.002" in page.text
    assert "logging.run_dir" not in page.text and "hidden_size" not in page.text and "loss_spike" not in page.text


def test_a_million_steps_keep_their_extremes(tmp_path: Path) -> None:
    """Fewer here: 50,000, drawn as 1,500 points; the reader's speed is proportional."""
    text = json.dumps(line(10**5))
    spike, steps = 31_337, 50_000
    run = make_run(tmp_path / "run", [])
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(
                text.replace("100000,", f"{step},", 1).replace(
                    '"grad_norm": 2.0', f'"grad_norm": {500.0 if step == spike else 2.0}'
                )
                + "\n"
            )
    start = time.process_time()
    page = report(tmp_path, run)
    seconds = time.process_time() - start
    assert seconds < 20 * steps / 1e6 + 3, f"{seconds:.1f} s"
    found = next(c for c in page.data["charts"]["grad-norm"]["curves"])
    size = page.data["axes"][found["axis"]]["steps_per_point"]
    assert size == 34 and len(found["values"]) <= POINTS and f"the mean of {size} consecutive steps" in page.text
    column = (spike - 1) // size
    assert found["high"][column] == 500.0 and found["low"][column] == 2.0 and sorted(set(found["high"])) == [2.0, 500.0]
    assert found["values"][column] == pytest.approx((500 + 2 * (size - 1)) / size, rel=1e-5)
    assert page.data["charts"]["grad-norm"]["log"], "the other steps would not be seen on a linear axis"
    assert (tmp_path / "report.html").stat().st_size < 2e6


def test_columns_are_numpys_of_each_part(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(size=3 * POINTS + 100)
    losses[::7] = np.nan
    table = read_run(make_run(tmp_path, [line(i + 1, loss=float(v)) for i, v in enumerate(losses)]), "run").steps
    found = curve(table, axis(table), "loss", "")
    assert found is not None and found.low is not None and found.high is not None
    for index in range(len(found.mid)):
        part = losses[index * 4 : (index + 1) * 4]
        assert [found.low[index], found.mid[index], found.high[index]] == pytest.approx(
            [np.nanmin(part), np.nanmean(part), np.nanmax(part)]
        )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p / "nowhere", "does not exist; a run is the folder that `train` writes to"),
        (lambda p: p, r"is no run, but there are some in it: .*good"),
        (lambda p: (p / "empty", (p / "empty").mkdir())[0], "it has neither metrics.jsonl nor status.json"),
        (lambda p: p / "good/config.yaml", "is a file, and no metrics.jsonl"),
        (lambda p: p / "godo", r"Did you mean .*good\?"),
    ],
)
def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], expected: str) -> None:
    make_run(tmp_path / "good", [line(1)])
    assert main(["report", str(make(tmp_path)), "--output", str(tmp_path / "report.html")]) == 1
    assert re.search(expected, capsys.readouterr().err) and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("output", "expected"), [(".", "is a folder"), ("missing/report.html", "there is no folder")])
def test_an_output_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, expected: str) -> None:
    run = make_run(tmp_path / "run", [line(1)])
    assert main(["report", str(run), "--output", str(tmp_path / output)]) == 1
    assert expected in capsys.readouterr().err


def test_the_commands_of_the_page_about_it_run(tmp_path: Path) -> None:
    for name in ("demo", "chat"):
        make_run(tmp_path / "runs" / name, [line(1), line(2)])
    run_commands("docs/watching.md", tmp_path, at_least=2)
    assert Reader((tmp_path / "compared.html").read_text()).data["runs"] == ["demo", "chat"]
    assert Reader((tmp_path / "report.html").read_text()).data["runs"] == ["demo"]


def test_ticks_are_round_and_few() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100] and ticks(1.3, 2.6) == [1.5, 2.0, 2.5]
    assert ticks(0, 2, whole=True) == [0, 1, 2] and ticks(0.5, 1.5, whole=True) == [1]
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000] and log_ticks(0.9, 60) == [1, 2, 5, 10, 20, 50]
    assert log_ticks(3.1, 4.2) == [3.5, 4.0]
    for low, high in ((0, 1), (17, 18), (-3, 1e6), (1e-9, 2e-9), (0, 999_999)):
        assert 2 <= len(ticks(low, high)) <= 6
    assert [number(v) for v in (0, 3e-4, 3e-5, 0.1 + 0.2, 1234.5, 12_345, 2.5e6, 1e12)] == [
        "0", "0.0003", "3e-5", "0.3", "1,234", "12.35k", "2.5M", "1T",
    ]  # fmt: skip


def _meet(folder: Path) -> None:
    """Wait for the other ranks: who is killed leaves none in an exchange, nor with a line to write."""
    (folder / f"met-{dist.get_rank()}").touch()
    while len(list(folder.glob("met-*"))) < dist.get_world_size():
        time.sleep(0.01)


def disturbed(nan_rows: list[int], killed_after: int, *command: str) -> int:
    """`megatron-llm COMMAND`, with rows that have no finite loss, and kill -9 after a step."""
    build, step = loop.build_train_stream, loop.train_step

    def train_step(engine: Any, stream: Any, state: Any, *rest: Any) -> Any:
        if state.step == killed_after:
            _meet(Path(command[1]).parent)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(engine, stream, state, *rest)

    loop.train_step = train_step
    loop.build_train_stream = lambda config: PlantedStream(build(config), dict.fromkeys(nan_rows, math.nan))  # type: ignore[assignment]
    return main(list(command))


def test_a_real_run_that_was_killed_went_on_elsewhere_skipped_a_step_and_went_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    raw = raw_config(run, write_rows(tmp_path / "data", range(72, 80)), checkpoint={"every_steps": 4, "asynchronous": False})
    command = ["train", str(write_config(tmp_path / "run.yaml", raw)), "logging.trace_steps=[12]"]
    killed = launch(2, disturbed, [48], 6, *command)
    assert [ending.code for ending in killed] == [KILLED] * 2, killed[0].log
    page = report(tmp_path, run)
    assert {mark["kind"] for mark in page.data["marks"]} == {"stall"} and page.curve("loss", "loss")[0] == list(range(1, 7))
    (ending,) = launch(1, disturbed, [48], -1, *command)
    assert ending.code == 0, ending.log

    page = report(tmp_path, run)
    marks = {(mark["kind"], mark["step"]) for mark in page.data["marks"] if mark["kind"] != "stall"}
    assert marks == {("start", 4), ("skipped", 7), ("rollback", 8)}
    assert "2 ranks: DP2 → 1 rank); before: killed" in page.text and "back from step 10 to step 8" in page.text
    taken = [each for each in read_metrics(run) if "loss" in each]
    assert page.curve("loss", "loss") == (
        list(range(1, 15)), [each["tokens"] for each in taken], [each["loss"] for each in taken],
    )  # fmt: skip
    assert page.curve("grad-norm", "grad_norm")[2][6] is None
    assert "done" in page.text and "LoRA" not in page.text and "8 rows × 16 = 128 tokens a step" in page.text
    picture = next(attrs["src"] or "" for tag, attrs in page.elements if tag == "img")
    assert picture.startswith("data:image/png;base64,iVBOR") and "step-00000012.png" in page.text

    starts = [json.loads(text) for text in (run / "starts.jsonl").read_text().splitlines()]
    layouts = [(each["step"], each["world_size"], each["layout"], each["device"]) for each in starts]
    assert layouts == [(0, 2, {"tp": 1, "pp": 1, "cp": 1, "dp": 2}, "cpu"), (4, 1, {"tp": 1, "pp": 1, "cp": 1, "dp": 1}, "cpu")]
    assert "before" not in starts[0] and starts[1]["before"] == {"outcome": "running"}


def charts_of(page: Page) -> dict[str, Any]:
    """Of every chart what is drawn: class -> the numbers of its path; labels of its axes; where its plot is."""
    found = page.evaluate(
        """Object.fromEntries([...document.querySelectorAll(".chart")].map((figure) => {
             const box = figure.querySelector(".plot").getBoundingClientRect();
             return [figure.id, {
               box: [box.left, box.top + scrollY, box.width, box.height],
               paths: [...figure.querySelectorAll(".plot path")].map((each) => [each.className.baseVal, each.getAttribute("d")]),
               labels: [...figure.querySelectorAll(".x span, .y span")].map((span) => span.textContent),
               marks: [...figure.querySelectorAll(".mark:not(.hidden)")].map((mark) => parseFloat(mark.style.left)),
             }];
           }))"""
    )
    for chart in found.values():
        chart["paths"] = [(kind, [float(text) for text in re.findall(r"-?[0-9.]+", path)]) for kind, path in chart["paths"]]
    assert isinstance(found, dict)
    return found


def coloured(picture: Any, box: list[float]) -> float:
    """The share of a part of a picture that is neither black, grey nor white."""
    left, top, width, height = (round(value) for value in box)
    part = picture[top : top + height, left : left + width, :3]
    return float((part.max(axis=2) - part.min(axis=2) > 0.2).mean())


@needs_chromium
@pytest.mark.slow
def test_a_browser_shows_every_chart_and_asks_for_nothing(tmp_path: Path) -> None:
    from matplotlib.image import imread

    evil = "</pre></script><script>document.title = 'owned'</script><img src=http://127.0.0.1:9/x onerror='document.title=1'>"
    marked = [line(step, skipped=step == 9, checkpoint_stall_seconds=float(step == 20)) for step in range(1, 101)]
    marked[10]["loss"], marked[50]["grad_norm"], marked[99]["valid_loss"] = None, 1e5, 2.0
    starts = [
        {"step": 0, "world_size": 1, "layout": {}},
        {"step": 30, "world_size": 1, "layout": {}, "before": {"outcome": "done"}},
    ]
    one = make_run(tmp_path / evil.replace("/", "-"), marked, starts=starts, samples=[{"step": 1, "prompt": evil, "reply": evil}])
    long = make_run(tmp_path / "long", [line(step, mfu=0.4) for step in range(1, 4001)])
    with browser() as page:
        for name, runs, views in (
            ("one", [one], [(1280, False), (1280, True)]), ("two", [one, long], [(1280, False), (390, False)]),
        ):  # fmt: skip
            report(tmp_path, *runs)
            for width, dark in views:
                page.open((tmp_path / "report.html").as_uri(), width, 900, dark)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
                assert page.evaluate("document.title").endswith(" – training report")
                picture = imread(BytesIO(page.screenshot()), format="png")
                drawn = charts_of(page)
                assert len(drawn) == (6 if name == "one" else 7)
                for chart, found in drawn.items():
                    assert coloured(picture, found["box"]) > 0.002, f"{name} at {width}: {chart} is blank"
                assert bool(picture[5, 5, :3].mean() < 0.2) is dark
                # The script draws what was drawn without it.
                page.evaluate("document.querySelectorAll('.log').forEach((button) => { button.click(); button.click() })")
                again = charts_of(page)
                for chart, found in drawn.items():
                    assert again[chart]["labels"] == found["labels"] and again[chart]["marks"] == pytest.approx(
                        found["marks"], abs=0.01
                    )
                    assert [kind for kind, _ in again[chart]["paths"]] == [kind for kind, _ in found["paths"]]
                    for (_, numbers), (_, expected) in zip(again[chart]["paths"], found["paths"], strict=True):
                        assert numbers == pytest.approx(expected, abs=0.11)
        left, top, width, height = drawn["loss"]["box"]
        page.evaluate("scrollTo(0, 0)")
        page.resize(1280, 900)
        left, top, width, height = charts_of(page)["loss"]["box"]
        page.move_mouse(left + 99 / 3999 * width, top + height / 2)
        shown = page.evaluate("document.querySelector('#loss .readout').textContent")
        assert f"step 100 {marked[99]['loss']:.5g}" in shown and "step 99" not in shown
        page.evaluate("document.querySelector('[data-axis=tokens]').click()")
        assert "400k" in charts_of(page)["lr"]["labels"]
        page.evaluate("document.querySelector('[data-toggle=\"1\"]').click()")
        assert {kind.split()[-1] for kind, _ in charts_of(page)["lr"]["paths"]} == {"grid", "c0"}
        assert page.problems == []
        assert {url.split(":")[0] for url in page.requests} == {"file"}

        (tmp_path / "control.html").write_text(
            "<img src='http://127.0.0.1:9/x'><script>console.log('said'); nothing.at.all</script>"
        )
        page.open((tmp_path / "control.html").as_uri())
        assert len(page.problems) >= 2 and any(url.startswith("http:") for url in page.requests), "what would have been noticed"


def test_a_start_is_recorded_behind_a_line_that_a_crash_cut_off(tmp_path: Path) -> None:
    config = parse_config(raw_config(tmp_path, "data"))
    (tmp_path / "status.json").write_text('{"outcome": "stopped", "step": 4, "reason": "SIGTERM", "changes": []}')
    (tmp_path / "starts.jsonl").write_text('{"step": 0, "world_size": 4, "layout": {}}\n{"step": 2, "wor')
    with RunFolder(config, 0) as folder:
        folder.record_start(4, 8, "cpu")
    run = read_run(tmp_path, "run")
    assert [(start.step, start.world_size) for start in run.starts] == [(0, 4), (4, 8)]
    assert run.starts[1].before == {"outcome": "stopped", "step": 4, "reason": "SIGTERM"}
    with RunFolder(config.model_copy(update={"checkpoint": CheckpointConfig(resume="never")}), 0) as folder:
        folder.record_start(0, 2, "cpu")
    assert [(start.step, start.world_size) for start in read_run(tmp_path, "run").starts] == [(0, 2)]
