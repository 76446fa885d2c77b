"""`megatron-llm plan`: the numbers that it prints, against the formulas of the papers; its mistakes and its picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_llm.cli import main as cli
from megatron_llm.pipeline.schedules import NAMES
from tests.test_readme import ROOT, prepare, run_commands

# Eight equal layers; two ids make a head that costs next to nothing; attention scores, which have no weight gradient, neither.
CONFIG = """
model: {vocab_size: 2, hidden_size: 256, intermediate_size: 1024, num_hidden_layers: 8, num_attention_heads: 4}
parallel: {pipeline_parallel: 4}
data: {kind: pretrain, train: [{path: there/is/no/such/file}]}
training: {sequence_length: 4, global_batch_size: 8, steps: 2}
optimizer: {lr: 1e-3}
"""
FAST_NETWORK = ["--bandwidth", "1e12"]


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


def _rows(text: str) -> dict[str, list[str]]:
    """The comparison's columns by schedule, in the order of the lines."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()[:1] and line.split()[0] in NAMES}


def test_compares_every_schedule_the_fastest_first(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", config_file, *FAST_NETWORK]) == 0
    out = capsys.readouterr().out
    rows = _rows(out)
    assert set(rows) == set(NAMES)
    steps = [float(row[1]) for row in rows.values()]
    assert steps == sorted(steps)
    assert [name for name, row in rows.items() if "configured" in row] == ["1f1b"]
    # (p - 1) / m; that over v; (p - 1)(F + B - W) / m (F + B + W); none but the fill of half a rank's F.
    bubbles = {name: float(row[2].rstrip("%")) for name, row in rows.items()}
    expected = {"gpipe": 37.5, "1f1b": 37.5, "interleaved": 18.75, "breadth_first": 18.75, "zb_v": 100 * 3 / 2 / 24}
    for name, percent in expected.items():
        assert bubbles[name] == pytest.approx(percent, abs=0.3), name
    spans = {name: float(row[3].rstrip("%")) for name, row in rows.items()}
    assert spans["zb_v"] == pytest.approx(0, abs=0.5) and spans["zb_h1"] == pytest.approx(12.5, abs=0.5)
    peaks = {name: float(row[4]) for name, row in rows.items()}
    assert peaks["gpipe"] / peaks["1f1b"] == pytest.approx(8 / 4, rel=0.05)  # on GPipe's last rank is the head besides


def test_a_line_for_every_rank(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """1F1B: rank r is idle (p - 1 - r) times F + B + W in its span; of m micro-batches it holds p - r at once."""
    assert cli.main(["plan", config_file, *FAST_NETWORK]) == 0
    out, _ = capsys.readouterr().out.split("predicted memory")
    lines = [line for line in out.splitlines() if re.match(r" +\d  ", line)]
    assert [re.split(r" {2,}", line.strip())[1] for line in lines] == ["embedding, 0-1", "2-3", "4-5", "6-7, head"]
    idle = [float(re.findall(r"([\d.]+)%", line)[0]) for line in lines]
    assert idle == pytest.approx([100 * (3 - rank) / 8 for rank in range(4)], abs=0.3)
    held = [float(line.split()[-1]) for line in lines]
    assert [value / held[2] for value in held[:2]] == pytest.approx([4 / 2, 3 / 2], rel=0.02)  # the last has a head besides


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "8 layers on 4 GPUs: tensor 1, pipeline 4, data 1; 8 micro-batches of 4 tokens"),
        (["--gpus", "8"], "8 layers on 8 GPUs: tensor 1, pipeline 4, data 2; 4 micro-batches of 4 tokens"),
        (["training.micro_batch_size=4"], "2 micro-batches of 16 tokens"),
        (["parallel.pipeline_schedule=interleaved", "parallel.virtual_stages=2"], "interleaved, 2 stages a rank: "),
        (["parallel.pipeline_parallel=1"], "8 layers on 1 GPU: "),
        (["model.num_hidden_layers=2"], "no work"),
    ],
)
def test_layouts(config_file: str, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", config_file, *arguments]) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus", "6"], "does not divide the world size 6"),
        (["--gpus", "0"], "--gpus 0: give at least the 4"),
        (["training.global_batch_size=7", "--gpus", "8"], "training.global_batch_size: 7"),
        (["parallel.virtual_stages=2"], "schedule 1f1b has 1 virtual stage, not 2"),
    ],
)
def test_mistakes_are_one_message(
    config_file: str, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", config_file, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and expected in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [["--tflops", "0"], ["--bandwidth", "nan"], ["--gpus", "many"]])
def test_numbers_that_make_no_sense_are_usage_errors(config_file: str, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", config_file, *arguments])
    assert caught.value.code == 2


def test_timeline_is_a_picture(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", config_file, "--timeline", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {tmp_path / 'out.png'}" in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("PNG", b"\x89PNG")])
def test_the_suffix_says_the_format_of_the_picture(config_file: str, tmp_path: Path, suffix: str, begins: bytes) -> None:
    assert cli.main(["plan", config_file, "--timeline", str(tmp_path / f"out.{suffix}")]) == 0
    assert (tmp_path / f"out.{suffix}").read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("out.jpg", "out.jpg: a picture's name ends in .png or .pdf or .svg"),
        ("out", "a picture's name ends in"),
        ("no/folder.png", "no; make it first"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_simulation(
    config_file: str, tmp_path: Path, name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", config_file, "--timeline", str(tmp_path / name)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and expected in captured.err and list(tmp_path.iterdir()) == [Path(config_file)]


def test_idle_time_is_the_same_in_table_and_picture(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And so is that of the whole schedule, of which each figure says what it is. Text of an SVG is in its comments."""
    path = tmp_path / "out.svg"
    assert cli.main(["plan", config_file, "parallel.pipeline_schedule=zb_v", "--timeline", str(path)]) == 0
    out = capsys.readouterr().out
    shown = [text.strip() for text in re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))]
    ranks, _ = out.split("predicted memory")
    idle = [re.findall(r"[\d.]+%", line) for line in ranks.splitlines() if re.match(r" +\d  ", line)]
    first = shown.index("idle, step") + 1
    assert shown[first : first + 4] == [in_step for _, in_step in idle] and len(idle) == 4
    _, _, in_step, in_span, *_ = _rows(out)["zb_v"]
    summary = (
        f"idle time in % of a rank's work: {in_step} in the step (busiest rank), {in_span} from its first action to its last"
    )
    assert any(summary in text for text in shown)


def test_one_of_a_thing(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.svg"
    overrides = ["parallel.pipeline_parallel=1", "training.global_batch_size=1"]
    assert cli.main(["plan", config_file, *overrides, "--timeline", str(path)]) == 0
    assert "8 layers on 1 GPU: tensor 1, pipeline 1, data 1; 1 micro-batch of 4 tokens" in capsys.readouterr().out
    assert "1f1b: 1 rank, 1 micro-batch -->" in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_command_of_the_pipeline_page_runs(tmp_path: Path) -> None:
    prepare(tmp_path)
    run_commands("docs/pipeline.md", tmp_path, at_least=3)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    traces = tmp_path / "runs/demo/traces"
    assert sorted(path.name for path in traces.iterdir()) == ["step-00000002.json", "step-00000002.png"]


def test_the_pipeline_page_has_a_line_for_every_schedule() -> None:
    page = (ROOT / "docs/pipeline.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"\n| `{name}` [" not in page] == []
