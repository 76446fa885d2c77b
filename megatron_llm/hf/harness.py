"""Scores of a Hugging Face folder on public tasks: lm-evaluation-harness (Gao et al.) on the model in transformers.

Called by `cli/evaluate.py`. The harness is an optional package. What is asked for is checked before the model is loaded.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_llm.data.tokenizer import load_pretrained


@dataclass(frozen=True)
class TaskSpec:
    """A task, or a group of tasks, of the harness.

    Attributes:
        shots: examples before each question; None: as the task says.
        metric: the one that counts; None: acc_norm, acc, or the first that the task has.
    """

    name: str
    shots: int | None = None
    metric: str | None = None


PRESETS = {
    # The first Open LLM Leaderboard's, without the two that it had only for a time.
    "open-llm-leaderboard": (
        TaskSpec("arc_challenge", 25, "acc_norm"),
        TaskSpec("hellaswag", 10, "acc_norm"),
        TaskSpec("mmlu", 5, "acc"),
        TaskSpec("truthfulqa_mc2", 0, "acc"),
    ),
}


@dataclass(frozen=True)
class Result:
    """What a model has on a task. `stderr` of the value, nan if unknown; `all`: every metric of the task."""

    task: str
    shots: int
    metric: str
    value: float
    stderr: float
    all: dict[str, float]


def parse_tasks(text: str) -> tuple[TaskSpec, ...]:
    """`arc_challenge:25,hellaswag` -> tasks with their shots. Raises ValueError."""
    found = []
    for part in text.split(","):
        name, colon, shots = part.strip().partition(":")
        if not name or (colon and not (shots.isascii() and shots.isdecimal())):
            raise ValueError(f"--tasks: {part.strip()!r} is no task such as arc_challenge, or with shots arc_challenge:25")
        found.append(TaskSpec(name, int(shots) if colon else None))
    return tuple(found)


def open_tasks(tasks: Sequence[TaskSpec], include_path: str | Path | None = None) -> Any:
    """The harness's TaskManager, if it knows all tasks. Raises ValueError if it does not, or is not installed.

    include_path: a folder of further tasks in YAML.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed: pip install 'megatron_llm[eval]'")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path: {include_path} is not a folder")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    check_known(tasks, manager.all_tasks)
    return manager


def check_known(tasks: Sequence[TaskSpec], known: Sequence[str]) -> None:
    """Raise ValueError for tasks that the harness does not know, with names like theirs."""
    problems = []
    for task in tasks:
        if task.name not in known:
            near = difflib.get_close_matches(task.name, known, n=5)
            hint = f"; near it are {', '.join(near)}" if near else ""
            problems.append(f"lm-evaluation-harness knows no task {task.name!r}{hint}")
    if problems:
        raise ValueError("\n".join(problems))


def evaluate_folder(
    folder: str | Path,
    tasks: Sequence[TaskSpec],
    manager: Any,
    *,
    limit: int | None = None,
    chat_template: bool = False,
    batch_size: int = 1,
    device: str = "cpu",
    dtype: str = "auto",
) -> list[Result]:
    """Evaluate the model of a folder on tasks. No code of the folder is run.

    Args:
        manager: of `open_tasks`.
        limit: questions of each task, the first ones; None: all.
        chat_template: show questions as a user's messages.
        dtype: of the weights; auto: as in the folder.

    Raises ValueError if there is no tokenizer, or the data of a task cannot be had.
    """
    if chat_template and not load_pretrained(folder).chat_template:
        raise ValueError(f"--apply-chat-template: the tokenizer of {folder} has no chat template")
    load_pretrained(folder)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device=device, dtype=dtype, batch_size=batch_size, trust_remote_code=False)
    results = []
    for task in tasks:
        try:
            found = simple_evaluate(
                model=model,
                tasks=[task.name],
                num_fewshot=task.shots,
                limit=limit,
                task_manager=manager,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                log_samples=False,
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise ValueError(f"the data of task {task.name} cannot be loaded: {error}") from error
        assert found is not None, "this is rank 0"
        results.append(_result(task, found))
    return results


def _result(task: TaskSpec, found: Any) -> Result:
    """The numbers of one task, whose names in the harness are such as `acc,none` and `acc_stderr,none`."""
    numbers: dict[str, float] = {}
    for key, value in found["results"][task.name].items():
        metric, _, _ = key.partition(",")
        if isinstance(value, int | float) and metric not in ("alias", "sample_len", "sample_count"):
            numbers.setdefault(metric, float(value))
    values = [name for name in numbers if not name.endswith("_stderr")]
    wanted = [task.metric] if task.metric else ["acc_norm", "acc", *values]
    metric = next((name for name in wanted if name in values), None)
    if metric is None:
        raise ValueError(f"task {task.name} has no metric {task.metric or ''}, but {', '.join(values) or 'none'}")
    shots = {name: count for name, count in found.get("n-shot", {}).items() if isinstance(count, int)}
    count = task.shots if task.shots is not None else next(iter(shots.values()), 0)
    return Result(task.name, count, metric, numbers[metric], numbers.get(f"{metric}_stderr", math.nan), numbers)


def table(results: Sequence[Result], average: bool) -> str:
    """The results in percent, a line each, and their mean."""
    lines = [f"{'task':<24}{'shots':>6}  {'metric':<12}{'%':>8}{'± stderr':>10}"]
    for result in results:
        stderr = "" if math.isnan(result.stderr) else f"{100 * result.stderr:.2f}"
        lines.append(f"{result.task:<24}{result.shots:>6}  {result.metric:<12}{100 * result.value:>8.2f}{stderr:>10}")
    if average:
        lines.append(f"{'average':<44}{100 * mean(results):>8.2f}")
    return "\n".join(lines)


def mean(results: Sequence[Result]) -> float:
    return sum(result.value for result in results) / len(results)


def summary(results: Sequence[Result], average: bool, **what: Any) -> dict[str, Any]:
    """The same for a file of JSON. What is not finite is None there: JSON has no nan."""
    tasks = [_finite(asdict(result)) for result in results]
    return {**what, "tasks": tasks, **(_finite({"average": mean(results)}) if average else {})}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return _finite(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: finite(value) for key, value in values.items()}
