"""A folder that several tasks write together, each some of its files; it appears whole when the last of them ends, or not at all.

Tasks share a file system and nothing else: they may run side by side or one after another, on any nodes, and die. Beside the
folder `OUT` that is to be, they keep `.OUT.parts`:

    job.json            what is written, and by how many: parts of two jobs never mix
    lock                held for the moments in which something below appears
    task-00001.XXXX/    what a task is writing; nothing refers to it yet
    done-00001.json     task 1 has ended: its files are in `folder`
    folder/             files of the tasks that have ended. The last adds what belongs to all, and renames it to OUT

So a task that was killed left nothing that counts, and can be repeated; one that is repeated after its end writes nothing.
Called by `hf/export.py` and `exchange/native.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_llm.hf.whole import check_output, local_output, replace_output, whole_folder
from megatron_llm.ops.storage import LocalFolder, sync_folder

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Which task this is: number `index` of `count`. Raises ValueError if there is no such task."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index}/{self.count}: the numbers of {self.count} tasks are 0 to {self.count - 1}")

    def of(self, items: Sequence[T], size: Callable[[T], int]) -> list[T]:
        """This task's items, in order: about as many bytes for each task, and every item in one share."""
        total, before, mine = max(1, sum(map(size, items))), 0, []
        for item in items:
            if min(before * self.count // total, self.count - 1) == self.index:
                mine.append(item)
            before += size(item)
        return mine


def write_together(
    output: str | Path,
    overwrite: bool,
    what: str,
    foreign: Callable[[Path], str | None],
    share: Share,
    job: Mapping[str, Any],
    write: Callable[[Path], Any],
    complete: Callable[[Path, list[Any]], None],
) -> bool:
    """Write this task's files of the folder `output`; returns whether it is whole now.

    Args:
        overwrite, what, foreign: as in `whole_folder`.
        job: tells this folder from any other, as JSON; the same in all tasks.
        write: puts files of this task into a folder, and returns what `complete` needs to know, as JSON.
        complete: gets the folder with the files of all tasks, and what they returned, and adds what is missing. It may be called
            twice if its first caller dies.

    Raises ValueError if `output` is in the way, or tasks of another job are.
    """
    if share.count == 1:
        with whole_folder(output, overwrite, what, foreign) as folder:
            complete(folder, [write(folder)])
        return True
    output = local_output(output)
    check = partial(check_output, output, overwrite, what, foreign)
    parts = _Parts(_parts_of(output), share)
    mine = parts.begin(job, what, check)
    try:
        result = write(mine) if mine is not None else None
    except FileNotFoundError:
        parts.refuse_if_gone(mine)
        raise

    def appear(folder: Path) -> None:
        check()  # again: time has passed
        replace_output(folder, output)
        sync_folder(output.parent)

    return parts.finish(mine, result, complete, appear)


def missing_shares(output: str | Path, count: int) -> list[int]:
    """The numbers of the tasks that have not ended."""
    root = _parts_of(Path(output).absolute())
    return [index for index in range(count) if root.is_dir() and not (root / _done(index)).exists()]


def _parts_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.parts")


def _done(index: int) -> str:
    return f"done-{index:05d}.json"


class _Parts:
    """The folder `.OUT.parts` as one task sees it."""

    def __init__(self, root: Path, share: Share):
        self.root, self.share = root, share
        self._folder, self._prefix = root / "folder", f"task-{share.index:05d}."

    def begin(self, job: Mapping[str, Any], what: str, check: Callable[[], None]) -> Path | None:
        """The empty folder that the task writes into; None if it has ended before.

        Raises ValueError if another job is here, and whatever `check` raises, before anything is written.
        """
        text = json.dumps([self.share.count, job], sort_keys=True)
        found = {"job": hashlib.sha256(text.encode()).hexdigest(), "tasks": self.share.count}
        with self._locked():
            file = self.root / "job.json"
            if file.exists() and json.loads(file.read_text()) == found and self._all_done() and not self._folder.exists():
                return None  # it has appeared, and who did it died then
            try:
                check()
            except ValueError:
                if not file.exists():
                    self._remove()
                raise
            if not file.exists():
                LocalFolder(self.root).commit(file.name, json.dumps(found).encode())
            elif json.loads(file.read_text()) != found:
                raise ValueError(
                    f"{self.root} holds parts of another {what}, or of one by another number of tasks; let its tasks end, or "
                    "delete it if there are none"
                )
            if (self.root / _done(self.share.index)).exists():
                return None
            for left in self.root.glob(f"{self._prefix}*"):  # by the same task, when it was killed
                # At once, as another process of the task, if it lives, must find all that it wrote or nothing.
                gone = self.root / f"gone-{left.name}"
                left.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
            return Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.root))

    def finish(
        self, mine: Path | None, result: Any, complete: Callable[[Path, list[Any]], None], appear: Callable[[Path], None]
    ) -> bool:
        """Hand in what was written; the last task completes the folder, and is told so."""
        with self._locked():
            if mine is not None:
                self.refuse_if_gone(mine)
                self._folder.mkdir(exist_ok=True)
                for file in mine.iterdir():
                    os.replace(file, self._folder / file.name)
                sync_folder(self._folder)
                LocalFolder(self.root).commit(_done(self.share.index), json.dumps(result).encode())
                mine.rmdir()
            if not self._all_done():
                return False
            if self._folder.exists():
                results = [json.loads((self.root / _done(index)).read_text()) for index in range(self.share.count)]
                complete(self._folder, results)
                appear(self._folder)
            self._remove()
            return True

    def refuse_if_gone(self, mine: Path | None) -> None:
        """Raises ValueError if another process of the same task has begun since."""
        if mine is not None and not mine.exists():
            raise ValueError(f"{mine} has gone: the same shard is being written by another process")

    def _all_done(self) -> bool:
        return all((self.root / _done(index)).exists() for index in range(self.share.count))

    def _remove(self) -> None:
        """At once, as a job that finds some of the marks of an earlier one would believe them."""
        gone = self.root.with_name(f"{self.root.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        self.root.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone in the folder, which is made if need be: whoever waits may see another complete and remove it."""
        while True:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                lock = (self.root / "lock").open("w")
            except FileNotFoundError:
                continue
            with lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                except OSError as error:
                    raise ValueError(f"{self.root}: this file system has no locks ({error}); use one task") from error
                if self._is_current(lock.fileno()):
                    yield
                    return

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.fstat(descriptor).st_ino == (self.root / "lock").stat().st_ino
        except FileNotFoundError:
            return False
