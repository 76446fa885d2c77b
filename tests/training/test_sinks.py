"""TensorBoard and W&B have what metrics.jsonl has, whatever happens to the run; and whatever happens to them, the run goes on.

What they have is read back from what they wrote: event files by TensorBoard's own reader, W&B's by its own records.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_llm.cli.main import main
from megatron_llm.config import ConfigError
from megatron_llm.training import loop, metrics, sinks
from megatron_llm.training.resolve import resolve
from megatron_llm.training.run_folder import RunFolder
from megatron_llm.training.sinks import Feed, close_all, step_of
from megatron_llm.training.wandb_store import records, rows_of
from tests.launch import KILLED, launch
from tests.runs import TINY
from tests.test_readme import blocks
from tests.training.commands import read_metrics, write_config
from tests.training.test_rollback import raw_config as spiking
from tests.training.test_rollback import write_rows

WANDB = {"project": "tests", "mode": "offline"}


def _config(run: Path, steps: int = 5, **logging_: Any) -> Path:
    raw = copy.deepcopy(TINY)
    raw["model"] |= {"num_hidden_layers": 1}
    raw["training"] |= {"steps": steps, "eval_every": 2, "eval_rows": 2}
    raw["checkpoint"] = {"every_steps": 2}
    raw["lr_schedule"] = {"kind": "constant"}
    raw["logging"] = {"run_dir": str(run), **logging_}
    run.parent.mkdir(exist_ok=True)
    return write_config(run.parent / f"{run.name}.yaml", raw)


def _train(config: Path, *overrides: str) -> int:
    return main(["train", str(config), *overrides])


def _fail_in(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the run die in a step, after those before were told of."""
    original = loop.train_step

    def failing(engine: Any, stream: Any, state: Any, *rest: Any) -> Any:
        if state.step + 1 == step:
            raise RuntimeError("planted")
        return original(engine, stream, state, *rest)

    monkeypatch.setattr(loop, "train_step", failing)


def _tensorboard(run: Path) -> dict[int, dict[str, float]]:
    """The scalars by step and tag, as TensorBoard shows them. Fails if a tag has a step twice."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = reader.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            assert tag not in found.setdefault(event.step, {}), f"{tag} of step {event.step} is there twice"
            found[event.step][tag] = event.value
    return found


def _wandb(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rows of all starts in their order, and the config. Fails if the starts are not one run, whose rows count on."""
    rows, config, ids = [], {}, set()
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        for record in records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("config"):
                config |= {update.key: json.loads(update.value_json) for update in record.config.update}
        rows += rows_of(file)
    assert ids == {json.loads((run / "sinks/wandb.json").read_text())["id"]}
    places = [row["_step"] for row in rows]
    assert places == sorted(set(places))
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows], config


def _expected(run: Path) -> dict[int, dict[str, Any]]:
    return {
        line["step"]: {name: value for name, value in line.items() if value is not None}
        for line in read_metrics(run)
        if "back_to_step" not in line
    }


def _check_tensorboard(run: Path) -> None:
    expected = {step: {name: float(line[name]) for name in line if name != "step"} for step, line in _expected(run).items()}
    found = _tensorboard(run)
    assert found.keys() == expected.keys()
    for step, line in expected.items():
        assert found[step] == pytest.approx(line, rel=1e-6), step  # they are float32


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks that do not hang get all the time that a busy machine takes."""
    monkeypatch.setattr(sinks, "FINISH_SECONDS", 300.0)
    monkeypatch.setattr(sinks, "_FAILED_SECONDS", 300.0)


@pytest.mark.slow
def test_a_run_that_dies_and_goes_on_is_one_run_in_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies after step 3, of which the checkpoint of step 2 knows nothing: step 3 is taken again."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    config = _config(run, tensorboard=True, wandb=WANDB | {"tags": ["a"]})
    with monkeypatch.context() as patch:
        _fail_in(4, patch)
        with pytest.raises(RuntimeError, match="planted"):
            _train(config)
    assert max(_expected(run)) == 3
    assert _train(config) == 0
    assert list(_expected(run)) == [0, 1, 2, 3, 4, 5]
    _check_tensorboard(run)
    rows, described = _wandb(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5], "every step once"
    for row in rows:
        line = _expected(run)[row["step"]]
        timed = {"step_seconds", "tokens_per_second", "tflops_per_device", "memory_peak_bytes", "checkpoint_stall_seconds"}
        assert {name: row[name] for name in line.keys() - timed} == {name: line[name] for name in line.keys() - timed}
    assert described["model"]["hidden_size"] == 32 and described["world_size"] == 1
    first = json.loads((run / "sinks/wandb.json").read_text())["id"]
    assert _train(config, "checkpoint.resume=never", "training.steps=1") == 0
    assert json.loads((run / "sinks/wandb.json").read_text())["id"] != first, "another run has another id"
    _check_tensorboard(run)


def _train_until_killed(config: str, lines: int) -> int:
    """Train, and end without a word when the file has so many lines."""
    original = metrics.append_line

    def dying(path: Path, line: Any) -> None:
        original(path, line)
        if line["step"] == lines:
            mark = path.parent / "sinks/wandb.json"
            while not mark.exists() or json.loads(mark.read_text())["step"] < lines - 1:
                time.sleep(0.05)  # the sinks get all but the last line
            os.kill(os.getpid(), signal.SIGKILL)

    metrics.append_line = dying
    return main(["train", config])


@pytest.mark.slow
def test_a_kill_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """W&B's service loses what it has not written; what that is, is seen on the disk."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    config = _config(run, steps=13, tensorboard=True, wandb=WANDB)
    assert [ending.code for ending in launch(1, _train_until_killed, str(config), 9)] == [KILLED]
    assert json.loads((run / "sinks/wandb.json").read_text())["step"] == 8
    assert _train(config) == 0
    _check_tensorboard(run)
    rows, _ = _wandb(run)
    assert [row["step"] for row in rows] == list(range(14))


@pytest.mark.slow
def test_going_back_from_a_spike(tmp_path: Path) -> None:
    """Steps that were undone and taken again with other rows: TensorBoard has the new ones; in W&B the later row holds."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    raw = spiking(run, write_rows(tmp_path / "data", range(72, 88)), logging={"tensorboard": True, "wandb": WANDB})
    assert _train(write_config(tmp_path / "run.yaml", raw)) == 0
    went_back = sum("back_to_step" in line for line in read_metrics(run))
    assert went_back
    _check_tensorboard(run)
    rows, _ = _wandb(run)
    last = {row["step"]: row for row in rows if "back_to_step" not in row}
    assert last == _expected(run)
    assert sum("back_to_step" in row for row in rows) == went_back


def test_a_sink_that_fails_gets_the_rest_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config, original = _config(run, tensorboard=True), sinks.TensorBoard.write

    def full(self: sinks.TensorBoard, line: Any) -> None:
        if step_of(line) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(sinks.TensorBoard, "write", full)
        assert _train(config, "training.steps=4") == 0
    assert capfd.readouterr().err.count("No space left on device") == 1
    assert max(_tensorboard(run)) == 2
    assert _train(config, "training.steps=5") == 0
    _check_tensorboard(run)


def test_a_sink_that_is_asked_for_later_gets_the_steps_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = _config(run)
    assert _train(config, "training.steps=2") == 0
    assert _train(config, "training.steps=4", "logging.tensorboard=true") == 0
    assert len(_expected(run)) == 5
    _check_tensorboard(run)


class _Fake:
    """A sink in memory that can be told to hang."""

    name = "fake"

    def __init__(self, hangs_in: str = "") -> None:
        self.mark: dict[str, Any] = {}
        self.lines: list[Any] = []
        self.closed: bool | None = None  # with what
        self.hangs_in, self.release, self.abandoned = hangs_in, threading.Event(), False

    def begin(self, step: int, undone: Any) -> int:
        self._maybe("begin")
        return min(step, self.mark.get("step", -1))

    def write(self, line: Any) -> None:
        self._maybe("write")
        self.lines.append(line)

    def close(self, failed: bool) -> None:
        self.closed = failed
        self._maybe("close")

    def abandon(self) -> None:
        self.abandoned = True

    def _maybe(self, where: str) -> None:
        if self.hangs_in == where:
            self.release.wait(60)


@pytest.mark.parametrize("where", ["begin", "write", "close"])
def test_a_sink_that_hangs_makes_nobody_wait(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sinks, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(sinks, "_WAITING_LINES", 50)
    monkeypatch.setattr(sinks.logger, "warning", lambda text, *values: said.append(text % values))
    sink = _Fake(where)
    feed = Feed(sink, tmp_path)
    start = time.monotonic()
    feed.begin(-1, [], [])
    for step in range(100 if where != "close" else 20):
        feed.write({"step": step})
    close_all([feed], False)
    assert time.monotonic() - start < 30
    assert len(said) == 1 and "logging.fake gets nothing more" in said[0] and sink.abandoned
    sink.release.set()


def test_sinks_that_hang_are_waited_for_together_and_less_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks of a run that failed wait for the reason, which rank 0 says when its sinks are closed."""
    monkeypatch.setattr(sinks, "FINISH_SECONDS", 5.0)
    monkeypatch.setattr(sinks, "_FAILED_SECONDS", 0.1)
    for failed, least, most in ((False, 5.0, 45.0), (True, 0.1, 4.5)):
        hanging = [_Fake("close") for _ in range(10)]
        start = time.monotonic()
        close_all([Feed(sink, tmp_path) for sink in hanging], failed)
        assert least <= time.monotonic() - start < most
        for sink in hanging:
            sink.release.set()


def test_sinks_are_closed_when_a_run_fails_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = _Fake()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics, "make_feeds", lambda *_: [Feed(sink, tmp_path)])
    monkeypatch.setattr(RunFolder, "record_start", full)
    with pytest.raises(OSError, match="No space left"):
        _train(_config(tmp_path / "run"))
    assert sink.closed is True


_TRAIN = """
import os, sys, time
from megatron_llm.cli.main import main
from megatron_llm.training import metrics, sinks
close_all = metrics.close_all
def close_when_it_waits(*args):
    while not os.path.exists(sys.argv[2]): time.sleep(0.1)
    close_all(*args)
metrics.close_all = close_when_it_waits
sinks.FINISH_SECONDS = 2.0
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_run_ends_although_the_server_of_wandb_does_not_answer(tmp_path: Path) -> None:
    """W&B itself would wait for it when Python ends."""
    pytest.importorskip("wandb")
    config = _config(tmp_path / "run", steps=1, wandb={"project": "tests", "mode": "online"})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = {"WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "WANDB_API_KEY": "a" * 40}
        asked = tmp_path / "asked"

        def be_asked() -> None:
            connection, _ = silent.accept()
            asked.touch()
            asked_to_end.wait()

        asked_to_end = threading.Event()
        threading.Thread(target=be_asked, daemon=True).start()
        command = [sys.executable, "-c", _TRAIN, str(config), str(asked)]
        # Without what W&B has left in this process for its children: they would use its service.
        kept = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        ended = subprocess.run(command, env=kept | server, capture_output=True, text=True, timeout=600)
        asked_to_end.set()
    assert ended.returncode == 0, ended.stderr
    assert "logging.wandb gets nothing more in this start: it did not finish in time" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert json.loads((tmp_path / "run/status.json").read_text())["outcome"] == "done"


def test_only_what_a_sink_has_not_got_is_handed_over(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": None if step == 1 else 1.0} for step in range(4)]
    for kept, has in ((lines, -1), (lines, 3), (lines[:2], 1)):
        sink = _Fake()
        feed = Feed(sink, tmp_path)
        feed.begin(kept[-1]["step"], kept, [])
        close_all([feed], False)
        assert sink.lines == [{name: value for name, value in line.items() if value is not None} for line in kept[has + 1 :]]


def test_metrics_that_cannot_be_written_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = metrics.append_line

    def full(path: Path, line: Any) -> None:
        original(Path("/dev/full") if line["step"] in (1, 2) else path, line)

    monkeypatch.setattr(metrics, "append_line", full)
    assert _train(_config(tmp_path / "run")) == 0
    assert capfd.readouterr().err.count("lines are missing from now on") == 1
    assert list(_expected(tmp_path / "run")) == [0, 3, 4, 5]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_absent_is_said_before_anything_starts(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"logging.{name}: the package {name} is not installed; pip install {name}"):
        resolve(_config(tmp_path / "run", **{name: True if name == "tensorboard" else WANDB}), None, 1)


def test_the_settings_that_the_page_shows(tmp_path: Path) -> None:
    (shown,) = blocks("yaml", "docs/watching.md")
    raw = copy.deepcopy(TINY) | yaml.safe_load(shown)
    resolved = resolve(write_config(tmp_path / "run.yaml", raw), [f"logging.run_dir={tmp_path}"], 1).config.logging
    assert resolved.tensorboard and resolved.wandb is not None and resolved.wandb.mode == "offline"
