"""Ends a run that has come to a standstill, and says where every rank stood. Called by `training/loop.py`.

A rank that hangs stops all others, since they wait for it in the next exchange. Each rank has a thread that looks whether
anything goes on. When nothing has for `training.hang_timeout` seconds, it writes the stacks of all Python threads of the rank to
RUN/stacks/rank-NNNNN.txt, says so in the status, asks the other ranks through the store of the run to do the same, waits a moment
for them, and ends the process with exit code 1.

`parallel.timeout_seconds` limits the wait in one exchange. If it is the shorter one, the ranks that wait fail, and
`training/roll_call.py` finds out who did not; on the way they ask for stacks here, which the rank that hangs writes as well. A
rank that is dead or stopped as a whole writes nothing, nor does one whose thread holds Python's lock: then the message names it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from megatron_llm.training.agreement import name_ranks
from megatron_llm.training.limits import FILE_SECONDS, Standstill, within
from megatron_llm.training.roll_call import SILENT, STORE_LOST, is_loss
from megatron_llm.training.run_folder import RunFolder

_LISTEN_SECONDS = 2.0  # between two looks into the store, which one process serves for all ranks
_GRACE_SECONDS = 15.0  # for all ranks to write their stacks
_STORE_SECONDS = 3.0
_ASKED, _WRITTEN = "hang watch, asked", "hang watch, written"


class HangWatch:
    """Context manager around what a rank does together with others. In it, `progress` must be called now and then.

    Args:
        timeout_seconds: without progress, after which the run ends; 0: never.
        folder: of the run; None only if there is no timeout.
        step: how many steps are taken, for the message.
    """

    def __init__(self, timeout_seconds: float = 0.0, folder: RunFolder | None = None, step: Callable[[], int] = lambda: 0):
        self._timeout, self._folder, self._step = timeout_seconds, folder, step
        self._latest = 0.0
        self._ended = threading.Event()
        self._told_to_end = threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: dist.Store | None = None

    def progress(self) -> None:
        """Say that something goes on. As cheap as reading a clock; from any thread."""
        self._latest = time.monotonic()

    def __enter__(self) -> HangWatch:
        if self._timeout:
            self.progress()
            self._threads.append(threading.Thread(target=self._watch, name="hang watch", daemon=True))
            if dist.is_initialized():
                # Connections of their own: a thread that waits for an answer on one keeps all others from using it.
                store = dist.distributed_c10d._get_default_store()
                self._store, listener = store.clone(), store.clone()  # type: ignore[attr-defined]
                self._threads.append(
                    threading.Thread(target=self._listen, args=(listener,), name="hang watch, asked", daemon=True)
                )
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and is_loss(error) and (store := self._store):
            within(_STORE_SECONDS, lambda: _ask_for_stacks(store))
        self._ended.set()
        for thread, seconds in zip(self._threads, (None, _STORE_SECONDS), strict=False):
            thread.join(seconds)  # the first ends the process if it has begun to; the second may wait for a dead store

    def _watch(self) -> None:
        tick = min(1.0, self._timeout / 10)
        standstill = Standstill(tick, self._latest)
        while not self._ended.wait(tick):
            idle = standstill.look(self._latest)
            if self._told_to_end.is_set() or idle >= self._timeout:
                self._end(idle, asked=self._told_to_end.is_set())

    def _listen(self, store: dist.Store) -> None:
        """Write stacks when another rank asks for them, and have the run ended if it says so."""
        written = False
        while not self._ended.wait(_LISTEN_SECONDS):
            try:
                if not store.check([_ASKED]):
                    continue
                if store.get(_ASKED) == b"end":
                    self._told_to_end.set()
                    return
            except RuntimeError:
                return  # the store has gone
            if not written:
                written = True
                within(FILE_SECONDS, lambda: self._write("another rank has lost one that it waited for"))

    def _end(self, idle: float, asked: bool) -> None:
        """Write everything and end the process. Never returns."""
        folder = self._folder
        assert folder is not None
        what = f"no progress for {idle:.0f} s after step {self._step()}"
        stacks = folder.path / "stacks"
        try:
            if asked:
                within(FILE_SECONDS, lambda: self._write(f"another rank found no progress; here none for {idle:.0f} s"))
                self._wait_for_others("")
                return
            reason = f"{what} (training.hang_timeout: {self._timeout:g}); stack traces of the ranks are in {stacks}"
            print(f"rank {folder.rank}: {reason}", file=sys.stderr, flush=True)
            if not within(FILE_SECONDS, lambda: self._write(what)):
                print(f"rank {folder.rank}: the stack traces cannot be written to {stacks}:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            within(FILE_SECONDS, lambda: folder.fail(reason))
            self._wait_for_others(reason)
        finally:
            os._exit(1)

    def _write(self, what: str) -> Path:
        """Append the stacks of this rank to its file."""
        assert self._folder is not None
        file = self._folder.path / "stacks" / f"rank-{self._folder.rank:05}.txt"
        file.parent.mkdir(exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            now, host = time.strftime("%Y-%m-%d %H:%M:%S"), os.uname().nodename
            step = self._step()
            stream.write(f"--- {now}, rank {self._folder.rank} (process {os.getpid()} on {host}), step {step}: {what}\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
            stream.write("\n")
        return file

    def _wait_for_others(self, reason: str) -> None:
        """Give other ranks the time to write, as they may be ended with this one.

        reason: why this rank ends, to which it adds who wrote no stacks; "" if another rank asked for the end and says it.
        """
        folder, store = self._folder, self._store
        if store is None or folder is None:
            return
        world = dist.get_world_size()

        def add(text: str) -> None:
            if reason:
                print(f"rank {folder.rank}: {text}", file=sys.stderr, flush=True)
                folder.fail(f"{reason}; {text}", replaces=reason)

        def meet() -> None:
            store.set(_ASKED, "end")
            store.set(f"{_WRITTEN} {folder.rank}", "")
            store.add(_WRITTEN, 1)
            deadline = time.monotonic() + _GRACE_SECONDS
            while (missing := store.add(_WRITTEN, 0) < world) and time.monotonic() < deadline:
                time.sleep(0.2)
            if missing and (silent := [rank for rank in range(world) if not store.check([f"{_WRITTEN} {rank}"])]):
                add(f"none of {name_ranks(silent)}: {SILENT}, or held in a call that keeps Python's lock")
            if folder.rank == 0:
                time.sleep(2.0)  # it may hold the store, in which the others are looking

        def meet_if_there() -> None:
            with suppress(RuntimeError):  # the store ended with the rank that held it
                meet()

        if not within(_GRACE_SECONDS + _STORE_SECONDS, meet_if_there):
            within(FILE_SECONDS, lambda: add(STORE_LOST))


def _ask_for_stacks(store: dist.Store) -> None:
    if not store.check([_ASKED]):  # a rank may have asked for more already
        store.set(_ASKED, "write")
