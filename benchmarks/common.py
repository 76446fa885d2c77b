"""What benchmarks do alike: options, the machine's description, the result as JSON, ranks, and the corpus of the tokenizing ones.

Imported by the scripts beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SUFFIXES = (".py", ".md", ".txt", ".rst")
VOCABULARY = 32_000
RANK_SECONDS = 600.0  # limit on an answer of a rank


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the script's docstring as help, and --output."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / f"{Path(sys.argv[0]).stem}.json")
    return made


def machine(*packages: str, **more: Any) -> dict[str, Any]:
    """What figures depend on, as it is before measuring: processor, load, and versions of the packages that are installed."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("megatron_llm", *packages)},
        **more,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def finish(output: Path, claim: str, holds: bool, conditions: dict[str, Any], **figures: Any) -> int:
    """Write the result, say where, and return the exit code: 0 if the claim holds."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    result = {"claim": claim, "holds": holds, "command": command, **figures, "machine": conditions}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print("  ".join(f"{name} {value}" for name, value in conditions.items()))
    print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}\nwritten to {output}")
    return 0 if holds else 1


class Ranks:
    """Processes of one gloo group, each with one thread on one core, that stay and answer calls.

    make(*args), of a module's level, is called on every rank; what it returns answers the calls. Arguments and answers
    travel by pickle. A rank that fails prints its traceback, and the call that waits for it raises RuntimeError.
    """

    def __init__(self, world: int, make: Callable[..., Callable[..., Any]], *args: Any):
        context = multiprocessing.get_context("spawn")  # memory is measured: nothing may come from this process
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            work = (theirs, rank, world, self._folder.name, make, args)
            context.Process(target=_serve, args=work, daemon=True).start()
            theirs.close()
            self._connections.append(ours)
        self._answers()

    def __call__(self, *args: Any) -> list[Any]:
        """The answers of all ranks, in their order."""
        for connection in self._connections:
            connection.send(args)
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(RANK_SECONDS):
                raise RuntimeError(f"rank {rank} has not answered for {RANK_SECONDS:g} s")
            try:
                answers.append(connection.recv())
            except (EOFError, ConnectionResetError):
                raise RuntimeError(f"rank {rank} died; why, is written above") from None
        return answers

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for connection in self._connections:
                connection.send(None)
            for connection in self._connections:
                connection.poll(RANK_SECONDS)  # until it has ended
        self._folder.cleanup()


def _serve(
    connection: Connection, rank: int, world: int, folder: str, make: Callable[..., Callable[..., Any]], args: tuple[Any, ...]
) -> None:
    """A rank: answer until told to end."""
    import torch
    import torch.distributed as dist

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's host name need not resolve
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=RANK_SECONDS))
    answer = make(*args)
    connection.send(None)
    while (call := connection.recv()) is not None:
        connection.send(answer(*call))
    dist.barrier()  # nobody closes its sockets while another rank may still read from them
    dist.destroy_process_group()


def add_corpus_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--megabytes", type=float, default=120, help="size of the corpus (default: %(default)s)")
    made.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "benchmark_preprocess")


def corpus_and_tokenizer(folder: Path, megabytes: float) -> tuple[Path, Path]:
    """The .py, .md, .txt and .rst files of this machine's Python as jsonl, and a byte-level BPE tokenizer trained on them.

    Both stay in `folder` for the next time.
    """
    corpus, tokenizer = folder / f"corpus-{megabytes:g}.jsonl", folder / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    if not corpus.exists():
        _make_corpus(corpus, int(megabytes * 1e6))
    if not (tokenizer / "tokenizer.json").exists():
        _train_tokenizer(corpus, tokenizer)
    return corpus, tokenizer


def _make_corpus(path: Path, size: int) -> None:
    """Write `size` bytes of {"text": ...} lines, whole files in a fixed random order."""
    roots = {sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]}
    found = sorted(file for root in roots for file in Path(root).rglob("*") if file.suffix in SUFFIXES and file.is_file())
    random.Random(0).shuffle(found)
    with path.open("wb") as out:
        for file in found:
            try:
                text = file.read_text("utf-8")
            except UnicodeDecodeError:
                continue
            if 0 < len(text) < 2_000_000:
                out.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            if out.tell() >= size:
                return
    raise ValueError(f"this machine has only {path.stat().st_size / 1e6:.0f} MB of text; ask for less with --megabytes")


def _train_tokenizer(corpus: Path, folder: Path) -> None:
    """A byte-level BPE tokenizer trained on the first 20 MB of the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with corpus.open("rb") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines.readlines(20_000_000)), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    tokenizer.save(str(folder / "tokenizer.json"))
