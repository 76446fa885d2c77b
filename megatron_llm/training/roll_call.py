"""Names the rank that ended a run. Used by `training/distributed.py` around everything that the ranks of a run do together.

A rank whose message does not come knows only whom it waited for, which may itself wait for another. So every rank says each
second in the store of the run that it lives, and a rank that fails leaves word there before it goes, and then looks: who
failed by itself, and who has fallen silent without a word. Killed and stopped processes fall silent; a rank that lives and does
not go on is found because all others leave word.

With NCCL a lost message does not surface in Python: torch's watchdog thread ends the process when `timeout_seconds` are over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megatron_llm.pipeline.messages import PeerLostError

_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 4.0  # without a beat
_LOOK_SECONDS = 0.2
_JUDGES = 4  # look at all ranks, the others wait for what they say: a store answers thousands of questions a second, not millions
_STORE_SECONDS = 10.0  # that the store may take beyond all waiting, as it hangs or dies with the rank that holds it

SILENT = "killed, stopped, or cut off from the network"
STORE_LOST = (
    "the store of the run, which its rank 0 or its launcher holds, does not answer: that process or its machine is lost, "
    "or the network to it"
)


@contextmanager
def roll_call(timeout_seconds: float) -> Iterator[None]:
    """What all ranks do inside, they do together: an error gets a note that says who failed first. Needs a process group.

    timeout_seconds: what collectives wait.
    """
    store = dist.distributed_c10d._get_default_store()
    call = RollCall(store, dist.get_rank(), dist.get_world_size(), timeout_seconds)
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

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_seconds: float):
        self._store, self._rank, self._world = store, rank, world
        self._patience = min(timeout_seconds, 60.0)  # others' time limits end up to an action later than this rank's
        self._ended = threading.Event()
        beating = (store.clone(),)  # type: ignore[attr-defined]
        self._beats = threading.Thread(target=self._beat, args=beating, daemon=True)
        self._beats.start()

    def end(self) -> None:
        """Stop saying that this rank lives.

        Waits for the thread that said so: one that is in C++ when the interpreter ends aborts the process.
        """
        self._ended.set()
        self._beats.join(_STORE_SECONDS)

    def verdict(self, error: Exception) -> str:
        """Who failed first, as far as can be known in bounded time, when this rank ends with `error`; "" if that says it itself.

        Leaves word for the others.
        """
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
        number = 0
        while not self._ended.is_set():
            try:
                store.set(self._key("beat", self._rank), str(number))
            except RuntimeError:
                return  # the store has gone
            number += 1
            self._ended.wait(_BEAT_SECONDS)

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
