"""Names the rank that ended a run. Used by `training/distributed.py` around everything that the ranks of a run do together.

A rank whose message does not come knows only whom it waited for, which may itself wait for another. So every rank says each
second in the store of the run that it lives, and a rank that fails leaves word there before it goes, and then looks: who
failed by itself, and who has fallen silent without a word. Killed and stopped processes fall silent; a rank that lives and does
not go on is found because all others leave word.

With NCCL a lost message does not surface in Python: torch's watchdog thread ends the process when `timeout_seconds` are over.

torch does not limit the wait for an answer of a store that cannot be reached: its calls return when the kernel gives up on the
connection, after a quarter of an hour or never, and no signal handler runs before. So a rank whose signs of life are not
confirmed for longer than an exchange may take ends its process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megatron_llm.pipeline.messages import PeerLostError
from megatron_llm.training.limits import Standstill, end_process

_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 4.0  # without a beat
_LOOK_SECONDS = 0.2
_JUDGES = 4  # look at all ranks, the others wait for what they say: a store answers thousands of questions a second, not millions
_STORE_SECONDS = 10.0  # that the store may take beyond all waiting, as it hangs or dies with the rank that holds it
STORE_GRACE_SECONDS = 60.0  # without an answer from the store beyond what a collective may wait, whose error says more

SILENT = "killed, stopped, or cut off from the network"
STORE_LOST = (
    "the store of the run, which its rank 0 or its launcher holds, does not answer: that process or its machine is lost, "
    "or the network to it"
)


@contextmanager
def roll_call(timeout_seconds: float, report: Callable[[str], object] = lambda reason: None) -> Iterator[None]:
    """What all ranks do inside, they do together: an error gets a note that says who failed first. Needs a process group.

    timeout_seconds: what collectives wait.
    report: called with the reason before the process is ended because its store does not answer.
    """
    store = dist.distributed_c10d._get_default_store()
    call = RollCall(store, dist.get_rank(), dist.get_world_size(), timeout_seconds, report)
    try:
        yield
    except Exception as error:
        if verdict := call.verdict(error):
            error.add_note(verdict)
        raise
    finally:
        call.end()


class RollCall:
    """The beats and words of a run's ranks. Every rank makes one."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        timeout_seconds: float,
        report: Callable[[str], object] = lambda reason: None,
    ):
        self._store, self._rank, self._world, self._report = store, rank, world, report
        self._patience = min(timeout_seconds, 60.0)  # others' time limits end up to an action later than this rank's
        self._store_limit = timeout_seconds + STORE_GRACE_SECONDS
        self._answers = 0
        self._ended, self._failing = threading.Event(), threading.Event()
        beating = (store.clone(),)  # type: ignore[attr-defined]
        self._beats = threading.Thread(target=self._beat, args=beating, daemon=True)
        self._beats.start()
        self._watch = threading.Thread(target=self._watch_store, daemon=True)
        self._watch.start()

    def end(self) -> None:
        """Stop saying that this rank lives.

        Waits for its threads: one that is in C++ when the interpreter ends aborts the process, and the last that lets go of a
        store is.
        """
        self._ended.set()
        for thread in (self._beats, self._watch):
            thread.join(_STORE_SECONDS)

    def verdict(self, error: Exception) -> str:
        """Who failed first, as far as can be known in bounded time, when this rank ends with `error`; "" if that says it itself.

        Leaves word for the others.
        """
        self._failing.set()
        said: list[str] = []

        def ask() -> None:
            try:
                said.append(self._leave_word_and_ask(error))
                self._store.set(self._key("gone", self._rank), "")
                if self._rank == 0:  # it may hold the store, which the others still need
                    self._wait_until(self._all_gone, _SILENCE_SECONDS + 2 * _BEAT_SECONDS)
            except RuntimeError:
                pass  # the store has gone

        thread = threading.Thread(target=ask, daemon=True)  # a store that hangs cannot be waited for with a limit
        thread.start()
        thread.join(self._patience + 2 * _SILENCE_SECONDS + _STORE_SECONDS)
        if said or not is_loss(error):
            return said[0] if said else ""
        return STORE_LOST

    def _beat(self, store: dist.Store) -> None:
        while not self._ended.is_set():
            try:
                self._answers = store.add(self._key("beat", self._rank), 1)  # which is answered, as `set` is not
            except RuntimeError:
                return  # the store has gone
            self._ended.wait(_BEAT_SECONDS)

    def _watch_store(self) -> None:
        """End the process when the store does not answer, unless it is failing already and says why."""
        standstill = Standstill(_BEAT_SECONDS, self._answers)
        while not self._ended.wait(_BEAT_SECONDS) and not self._failing.is_set():
            if (silent := standstill.look(self._answers)) >= self._store_limit:
                end_process(self._rank, f"no answer for {silent:.0f} s: {STORE_LOST}", self._report)

    def _leave_word_and_ask(self, error: Exception) -> str:
        self._store.set(self._key("word", self._rank), "")
        if not is_loss(error):
            text = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
            number = self._store.add("roll call, failures", 1)
            self._store.set(self._key("failure", number), f"rank {self._rank} failed first: {text}")
            return ""
        if self._store.add("roll call, judges", 1) <= _JUDGES:
            self._store.set("roll call, verdict", self._judge())
        limit = self._patience + 2 * _SILENCE_SECONDS
        return self._wait_until(lambda: self._read("roll call, verdict"), limit) or "no rank could say who failed first"

    def _judge(self) -> str:
        """Wait until it is clear who failed."""
        heard: dict[int, tuple[str | None, float]] = {}

        def found() -> str:
            if failure := self._read(self._key("failure", 1)):
                return failure
            now = time.monotonic()
            for rank in range(self._world):
                beat = self._read(self._key("beat", rank))
                if rank not in heard or heard[rank][0] != beat:
                    heard[rank] = beat, now
            silent = [rank for rank in self._without_word() if now - heard[rank][1] > _SILENCE_SECONDS]
            return f"{_ranks(silent)} gave no sign of life for {_SILENCE_SECONDS:g} s: {SILENT}" if silent else ""

        if verdict := self._wait_until(found, self._patience + _SILENCE_SECONDS):
            return str(verdict)
        left = self._without_word()
        return f"only {_ranks(left)} left no word: alive, and not going on" if left else "no rank failed by itself"

    def _without_word(self) -> list[int]:
        return [rank for rank in range(self._world) if not self._store.check([self._key("word", rank)])]

    def _all_gone(self) -> bool:
        """Whether every rank has had its verdict."""
        return all(self._store.check([self._key("gone", rank)]) for rank in range(self._world))

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    @staticmethod
    def _key(what: str, number: int) -> str:
        return f"roll call, {what} {number}"

    @staticmethod
    def _wait_until(condition: Callable[[], Any], seconds: float) -> Any:
        """The condition's value as soon as it is true, or when the time is over."""
        deadline = time.monotonic() + seconds
        while not (value := condition()) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return value


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or late, rather than what is wrong with this one."""
    return isinstance(error, PeerLostError | dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))} of the run"
