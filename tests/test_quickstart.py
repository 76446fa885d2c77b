"""The quickstart: its corpus and instructions, its restart logic, and (slow) the whole recipe as a user runs it."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "quickstart"

SOURCE = '''
class Greeter:
    @property
    def name(self):
        """The name."""
        # a comment
        return self._name

    async def greet(self, *,
                    loud: bool = False) -> str:
        """Greet.

        Politely.
        """
        def inner():
            return 1

        return "hi"

    def undocumented(self):
        return 2

    def only_docstring(self):
        """Nothing to write."""

    def one_line(self): "doc"; return 3
'''


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A function that imports a file of the quickstart, which lies outside any package."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load_module(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load_module


def test_functions_split_into_signature_and_body(load: Callable[[str], ModuleType]) -> None:
    pairs = dict(load("corpus")._functions(SOURCE))
    assert sorted(pairs) == [
        'async def greet(self, *,\n                loud: bool = False) -> str:\n    """Greet.\n\n    Politely.\n    """',
        'def name(self):\n    """The name."""',
    ]
    assert pairs['def name(self):\n    """The name."""'] == "    # a comment\n    return self._name"
    wanted = {node.name: node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for head, body in pairs.items():
        function = ast.parse(f"{head}\n{body}").body[0]
        original = wanted[function.name]
        assert ast.dump(function.args) == ast.dump(original.args)
        assert list(map(ast.dump, function.body[1:])) == list(map(ast.dump, original.body[1:]))


@pytest.mark.slow
def test_corpus_parts_share_no_module_and_no_held_out_function(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    corpus = load("corpus")
    corpus.write_documents(tmp_path / "text")
    parts = {p: [json.loads(line) for line in (tmp_path / "text" / f"{p}.jsonl").open()] for p in corpus.PARTS}
    paths = {part: {record["path"] for record in records} for part, records in parts.items()}
    assert "argparse.py" in set.union(*paths.values())
    assert sum(map(len, paths.values())) == len(set.union(*paths.values()))
    characters = {part: sum(len(record["text"]) for record in records) for part, records in parts.items()}
    assert characters["stage1"] > 2_000_000 and characters["stage2"] > 1_000_000 and characters["valid"] > 200_000

    counted = []

    def count_tokens(conversations: list) -> list[int]:
        counted.append(len(conversations))
        return [sum(len(message["content"]) for message in messages) for messages in conversations]

    corpus.write_instructions(tmp_path / "text", tmp_path / "chat", count_tokens, 700)
    train, valid = (
        [json.loads(line)["messages"] for line in (tmp_path / "chat" / f"{p}.jsonl").open()] for p in ("train", "valid")
    )
    assert len(train) >= corpus.MIN_PAIRS and len(train) < sum(counted)
    assert all(len(messages[0]["content"]) + len(messages[1]["content"]) <= 700 for messages in train + valid)
    questions = [messages[0]["content"] for messages in train + valid]
    assert len(set(questions)) == len(questions)


def test_too_few_instructions_are_an_error(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    corpus = load("corpus")
    for part in corpus.PARTS:
        (tmp_path / f"{part}.jsonl").write_text(json.dumps({"path": "a.py", "text": SOURCE}) + "\n")
    with pytest.raises(ValueError, match="only 0 instructions .* expected at least 2000"):
        corpus.write_instructions(tmp_path, tmp_path / "chat", lambda conversations: [1] * len(conversations), 10)


def test_steps_are_resumed_skipped_and_redone(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = load("run")
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    monkeypatch.setattr(run, "HERE", recipe)
    (recipe / "a.py").write_text("1")
    (recipe / "b.py").write_text("1")
    calls: list[str] = []
    broken = True

    def make(name: str) -> None:
        left_over = Path(name, "partial").exists()
        calls.append(f"{name} resumed" if left_over else name)
        Path(name).mkdir(exist_ok=True)
        Path(name, "partial").touch()
        if name == "b" and broken:
            raise KeyboardInterrupt

    steps = [run.Step("A", "a", ("a.py",), lambda: make("a")), run.Step("B", "b", ("b.py",), lambda: make("b"))]
    with pytest.raises(KeyboardInterrupt):
        run.run_steps(steps)
    broken = False
    run.run_steps(steps)
    assert calls == ["a", "b", "b resumed"]
    run.run_steps(steps)
    assert calls == ["a", "b", "b resumed"]
    (recipe / "b.py").write_text("2")
    run.run_steps(steps)
    assert calls[3:] == ["b"]
    (recipe / "a.py").write_text("2")
    run.run_steps(steps)
    assert calls[4:] == ["a", "b"]

    Path("foreign").mkdir()
    with pytest.raises(SystemExit, match="in the way"):
        run.run_steps([*steps, run.Step("C", "foreign", (), lambda: make("foreign"))])
    assert Path("foreign").exists()


@pytest.mark.parametrize("after", [3.0, 5.0, 6.0])
def test_a_stage_that_does_not_improve_fails_the_recipe(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    run = load("run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "sample", lambda stage: ("", ""))
    for stage in run.STAGES:
        (tmp_path / stage).mkdir()
        last = after if stage == "stage2" else 4.0
        lines = [{"step": 0, "valid_loss": 5.0}, {"step": 1, "loss": 4.5}, {"step": 2, "loss": 4.4, "valid_loss": last}]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run.report() is (after < 5.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whole_quickstart_survives_a_kill_and_every_stage_improves(tmp_path: Path) -> None:
    """As `make quickstart`, killed in the middle of stage 1 and started again."""
    out = tmp_path / "out"
    command = [sys.executable, str(FOLDER / "run.py"), "--out", str(out)]
    start = time.monotonic()
    with open(tmp_path / "first.log", "w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not list(out.glob("stage1/checkpoints/*/manifest.json")):
                assert first.poll() is None, (tmp_path / "first.log").read_text()
                assert time.monotonic() - start < 2400, "no checkpoint of stage 1"
                time.sleep(0.2)
        finally:
            # The whole tree: ranks live in sessions of their own and would survive their launcher.
            for process in [*psutil.Process(first.pid).children(recursive=True), first]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            first.wait()
    resumed_from = max(int(path.name.removeprefix("step-")) for path in out.glob("stage1/checkpoints/step-*"))
    second = subprocess.run(command, capture_output=True, text=True, timeout=2400)
    assert second.returncode == 0, second.stdout + second.stderr

    assert second.stdout.count("done before") == 4
    stage1 = [json.loads(line) for line in (out / "stage1" / "metrics.jsonl").open()]
    assert resumed_from > 0 and max(line["step"] for line in stage1) > resumed_from
    for stage in ("stage1", "stage2", "stage3"):
        lines = [json.loads(line) for line in (out / stage / "metrics.jsonl").open()]
        valid = [line["valid_loss"] for line in lines if line.get("valid_loss") is not None]
        assert valid[-1] < valid[0], stage
        assert (out / "hf" / stage / "config.json").exists()
    assert second.stdout.count("improved") == 3 and "NOT IMPROVED" not in second.stdout
    replies = [json.loads(line) for line in (out / "replies" / "replies.jsonl").open()]
    assert len(replies) == 100 and sum(line["ended"] for line in replies) >= 90, "the stop token is learned"
    page = out / "report.html"
    assert str(page) in second.stdout and page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
