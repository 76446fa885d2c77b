"""Removing duplicate documents: equal texts, and near duplicates found by MinHash (Broder 1997; Indyk, Motwani 1998).

The work is a list of stages, each some tasks of a datatrove pipeline, run by datatrove's executors on this machine or as SLURM
jobs that wait for one another. This module makes the list and runs it; `dedup_rules.py` says what a duplicate is,
`dedup_steps.py` and `dedup_output.py` hold the steps. Called by `cli/dedup.py`. datatrove is an optional dependency.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatron_llm.data.prepare.dedup_rules import Signature, signature_for

if TYPE_CHECKING:
    from megatron_llm.data.prepare.chunks import InputFile

FORMATS = ("lines", "parquet")  # records that can be written back as they were
MAX_TASKS = 1000  # by default; SLURM's usual limit of an array of jobs is 1001

POLL_SECONDS = 0.2  # between two looks at the workers


@dataclass(frozen=True)
class Slurm:
    """Where and how the jobs of the SLURM executor run. `options` are further ones of sbatch, by their long names."""

    partition: str
    time: str
    memory_gb: int = 4
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DedupOptions:
    """What to look for; `buckets` and `hashes_per_bucket` together replace `similarity`. Raises ValueError for nonsense."""

    text_key: str = "text"
    exact: bool = True
    near: bool = True
    similarity: float = 0.8
    buckets: int | None = None
    hashes_per_bucket: int | None = None
    ngram: int = 5
    seed: int = 1
    strict: bool = False
    tasks: int | None = None

    def __post_init__(self) -> None:
        if not (self.exact or self.near):
            raise ValueError("--no-exact and --no-near leave nothing to do")
        if (self.buckets is None) != (self.hashes_per_bucket is None):
            raise ValueError("--buckets and --hashes-per-bucket go together; give both, or neither and --similarity")
        for name in ("buckets", "hashes_per_bucket", "ngram", "tasks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} is not positive")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed} is not between 0 and 2^32 - 1")
        _ = self.signature

    @property
    def signature(self) -> Signature:
        if self.buckets is not None and self.hashes_per_bucket is not None:
            return Signature(self.buckets, self.hashes_per_bucket)
        return signature_for(self.similarity)


@dataclass(frozen=True)
class Stage:
    """Some tasks of one datatrove pipeline; a stage needs all stages before it."""

    name: str
    tasks: int
    pipeline: list[Any]


def deduplicate(
    inputs: Sequence[str | Path],
    output: str | Path,
    options: DedupOptions,
    *,
    work: str | Path | None = None,
    report: str | Path | None = None,
    workers: int | None = None,
    slurm: Slurm | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Copy the records that are no duplicates to the folder `output`, one file for each input file, and return the report.

    Records are kept unchanged and in order: lines byte for byte, parquet rows with their schema. `work` (default: OUTPUT.work)
    holds what the stages pass on, their logs, `report.json` (copied to `report`), and the lists `removed.jsonl` and
    `skipped.jsonl`. `workers` tasks run at a time (default: as many as there are cores, as SLURM allows). Run again with the
    same arguments, it goes on where it was interrupted; when all is done it only returns the report. With `slurm` the stages
    are submitted as jobs, and None is returned until they have ended.

    Raises ValueError for unusable input or options, if no record has a text, for a work folder of another run, and without
    datatrove.
    """
    _require_datatrove()
    from megatron_llm.data.prepare.inputs import describe_inputs, find_inputs

    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} is not positive")
    output = Path(output).absolute()
    work = Path(work).absolute() if work else output.with_name(output.name + ".work")
    files = find_inputs(inputs)
    _check_files(files)
    _claim(work, output, asdict(options) | {"output": str(output), "inputs": describe_inputs(files)})
    stages = make_stages(files, options, work, output)
    if slurm is None:
        _run_here(stages, work, workers or len(os.sched_getaffinity(0)), progress)
    elif not _submit(stages, work, slurm, workers or -1):
        return None
    content = _report(work, report)
    count = content["documents"]
    if 0 < count["in"] == count["skipped"]:
        reasons = ", ".join(f"{number:,} x {reason}" for reason, number in content["skipped"].items())
        raise ValueError(
            f"all {count['in']:,} records were skipped: {reasons}; see {content['skipped_list']}. "
            f"To try another --text-key, remove {work} and {output} or name another output"
        )
    return content


def _report(work: Path, copy: str | Path | None) -> dict[str, Any]:
    """The report of a finished run, also copied. Raises ValueError if files of the result are missing."""
    path = work / "report.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"files": [{"output": str(path)}]}
    missing = [file["output"] for file in content["files"] if not os.path.exists(file["output"])]
    if missing:
        raise ValueError(f"{missing[0]} was written and is gone; remove {work} and what is left of the output to start over")
    if copy:
        Path(copy).absolute().parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return content


def _require_datatrove() -> None:
    try:
        import datatrove.pipeline.dedup.minhash  # noqa: F401
    except ImportError as error:
        raise ValueError(f"deduplication needs datatrove ({error}): pip install 'megatron_llm[dedup]'") from error


def _check_files(files: Sequence[InputFile]) -> None:
    wrong = [file.path for file in files if file.format not in FORMATS or file.format == "parquet" and file.compression]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: deduplication reads .jsonl (also compressed) and .parquet, which it can write back unchanged"
        )


def _claim(work: Path, output: Path, settings: dict[str, Any]) -> None:
    """Mark the work folder as belonging to these settings. Raises ValueError if it, or the output, belongs to something else."""
    from megatron_llm.data.prepare.dedup_steps import write_json

    path = work / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        differing = [name for name in settings if settings[name] != before.get(name)]
        if differing:
            raise ValueError(
                f"{work} belongs to a run with other settings ({', '.join(differing)}); "
                f"remove it and {output} to start over, or name another output"
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and {work} does not say that it is an unfinished result; name another output")
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def make_stages(files: Sequence[InputFile], options: DedupOptions, work: Path, output: Path) -> list[Stage]:
    """The stages in their order. Only stages that read files have as many tasks as asked for, at most one a file."""
    from megatron_llm.data.prepare.dedup_output import Summarize, WriteKept
    from megatron_llm.data.prepare.dedup_steps import Decide, FindExact, HashTexts, ReadDocuments

    tasks = min(len(files), options.tasks or MAX_TASKS)
    texts, found = work / "exact/texts", work / "exact/found"
    stages = []
    if options.exact:
        read = ReadDocuments(files, options.text_key, options.strict)
        stages += [
            Stage("exact-hash", tasks, [read, HashTexts(texts)]),
            Stage("exact-find", tasks, [FindExact(texts, found)]),
        ]
    if options.near:
        read = ReadDocuments(files, options.text_key, options.strict, found if options.exact else None)
        stages += _near_stages(read, tasks, options, work / "near")
    settings = asdict(options) | asdict(options.signature) | {"threshold": options.signature.threshold}
    return [
        *stages,
        Stage("decide", 1, [Decide(work, tasks, options.exact, options.near)]),
        Stage("write", tasks, [WriteKept(files, options.text_key, work, output)]),
        Stage("report", 1, [Summarize(files, work, settings)]),
    ]


def _near_stages(read: Any, tasks: int, options: DedupOptions, work: Path) -> list[Stage]:
    """datatrove's first three stages; the fourth keeps an arbitrary document of a cluster, so `Decide` replaces it.

    Its default of reading all numbers as 0 is off: texts that differ in numbers only would always be one.
    """
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.text import TextNormConfig

    from megatron_llm.data.prepare.dedup_steps import DescribeDocuments, Signatures, Words

    shape = options.signature
    config = MinhashConfig(
        n_grams=options.ngram,
        num_buckets=shape.buckets,
        hashes_per_bucket=shape.hashes,
        seed=options.seed,
        norm_config=TextNormConfig(norm_numbers=False),
        hash_config=HashConfig(precision=64, hash_fc="sha1"),
    )
    signatures, pairs, clusters = (str(work / name) for name in ("signatures", "pairs", "clusters"))
    sign = [read, DescribeDocuments(work / "documents"), Signatures(signatures, config, Words())]
    return [
        Stage("near-sign", tasks, sign),
        Stage("near-match", shape.buckets, [MinhashDedupBuckets(signatures, pairs, config=config)]),
        Stage("near-cluster", 1, [MinhashDedupCluster(pairs, clusters, config, save_cluster_id=True)]),
    ]


def _log_folder(work: Path, number: int, stage: Stage) -> Path:
    return work / f"logs/{number}-{stage.name}"


def _run_here(stages: Sequence[Stage], work: Path, workers: int, progress: bool) -> None:
    """Run the tasks that are not completed yet, `workers` at a time."""
    import multiprocess  # type: ignore[import-untyped]
    from datatrove.executor import LocalPipelineExecutor

    multiprocess.set_forkserver_preload(["megatron_llm.data.prepare.dedup_output"])  # else each worker of each stage imports it
    for number, stage in enumerate(stages):
        folder = _log_folder(work, number, stage)
        at_once = min(workers, stage.tasks)
        executor = LocalPipelineExecutor(stage.pipeline, tasks=stage.tasks, workers=at_once, logging_dir=str(folder))
        with _quiet(work / "logs/output.log") as terminal, _watched(stage, at_once, folder, terminal if progress else None):
            executor.run()


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[TextIO]:
    """Send what this process and those it starts write to stderr to a file, and give the real stderr.

    datatrove logs to stderr from every process, whatever is set up here.
    """
    from datatrove.utils.logging import setup_default_logger

    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with log.open("a") as file, open(terminal, "w", closefd=False) as stream, contextlib.redirect_stderr(file):
            os.dup2(file.fileno(), 2)
            setup_default_logger()  # it writes to what sys.stderr was when this was called
            yield stream
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        setup_default_logger()


@contextlib.contextmanager
def _watched(stage: Stage, at_once: int, logs: Path, terminal: TextIO | None) -> Iterator[None]:
    """Show how many tasks of the stage are done, and raise RuntimeError if a worker process is killed.

    The pool that datatrove uses puts another in the place of a lost one, and waits for the lost task for ever. The main thread,
    which waits, is interrupted. Processes are numbered as they are made, first the one of datatrove's queues, then the pool's:
    so one with a higher number tells of a loss that nobody saw.
    """
    import multiprocess
    from tqdm import tqdm

    ended, killed = threading.Event(), threading.Event()
    workers: set[Any] = set()
    regular = (None, 0, -signal.SIGTERM)  # running, left, ended by the pool
    last = _number(multiprocess.Process()) + 1 + at_once
    bar = tqdm(total=stage.tasks, desc=stage.name, unit="task", file=terminal, disable=terminal is None)

    def show() -> None:
        if done := len(list(logs.glob("completions/*"))) - bar.n:
            bar.update(done)

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            show()
            workers.update(child for child in multiprocess.active_children() if "PoolWorker" in child.name)
            if any(worker.exitcode not in regular or _number(worker) > last for worker in workers):
                killed.set()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if killed.is_set():
            raise RuntimeError(
                f"a worker of stage {stage.name} was killed, perhaps for its memory; run again, it goes on here (fewer --workers "
                f"take less memory); logs: {logs}"
            ) from None
        raise
    finally:
        ended.set()
        thread.join()
        show()
        bar.close()


def _number(process: Any) -> int:
    """Its place among all processes that this one has made: they are called Something-1, Something-2, ..."""
    return int(process.name.rpartition("-")[2])


def _submit(stages: Sequence[Stage], work: Path, slurm: Slurm, workers: int) -> bool:
    """Submit what is not completed as jobs that wait for one another; True if everything is completed.

    Raises ValueError if jobs of an earlier call are not over yet, or if they cannot be submitted here.
    """
    from datatrove.executor import SlurmPipelineExecutor

    activate = Path(sys.prefix) / "bin/activate"
    jobs_file = work / "jobs.json"
    before = None
    executors = []
    for number, stage in enumerate(stages):
        before = SlurmPipelineExecutor(
            stage.pipeline,
            tasks=stage.tasks,
            time=slurm.time,
            partition=slurm.partition,
            mem_per_cpu_gb=slurm.memory_gb,
            workers=workers,
            job_name=f"dedup-{stage.name}",
            qos=None,
            venv_path=str(activate) if activate.exists() else None,
            sbatch_args=slurm.options,
            depends=before,
            logging_dir=str(_log_folder(work, number, stage)),
        )
        executors.append(before)
    if not any(executor.get_incomplete_ranks() for executor in executors):
        return True
    _check_ended(json.loads(jobs_file.read_text()) if jobs_file.exists() else [])
    with _quiet(work / "logs/output.log"):
        try:
            executors[-1].run()
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise ValueError(f"sbatch did not take the jobs ({error}); see {work}/logs/output.log") from error
        finally:
            jobs_file.write_text(json.dumps([executor.job_id for executor in executors if executor.job_id not in (None, -1)]))
    return False


def _check_ended(jobs: Sequence[str]) -> None:
    """Raises ValueError if SLURM still has one of these jobs: a second copy would write the same files."""
    for job in jobs:
        listed = subprocess.run(["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True)
        if listed.stdout.strip():  # a job that ended long ago is an error of squeue, and not listed
            raise ValueError(f"job {job} of this run is still queued or running; wait for it or cancel it, then run again")
