"""Names the rank that ended a run. Used by `training/distributed.py` around everything that the ranks of a run do together.

A rank whose message does not come knows only whom it waited for, which may itself wait for another. So every rank says each
second in the store of the run that it lives, and a rank that fails leaves word there before it goes, and then looks: who
failed by itself, and who has fallen silent without a word. Killed and stopped processes fall silent; a rank that lives and does
not go on is found because all others leave word.

With NCCL a lost message does not surface in Python: torch's watchdog thread ends the process when `timeout_seconds` are over.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megatron_llm.pipeline.messages import PeerLostError

_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 4.0  # without a beat
_STORE_SECONDS = 10.0  # that the store may take beyond all waiting, as it hangs or dies with the rank that holds it


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
        error.add_note(call.verdict(error))
        raise
    finally:
        call.end()


class RollCall:
    """The beats and words of a run's ranks. Every rank makes one."""

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_seconds: float):
        self._store, self._rank, self._world = store, rank, world
        self._patience = min(timeout_seconds, 60.0)  # others' time limits end up to an action later than this rank's
        self._ended = threading.Event()
        threading.Thread(target=self._beat, args=(store.clone(),), daemon=True).start()  # type: ignore[attr-defined]

    def end(self) -> None:
        """Stop saying that this rank lives."""
        self._ended.set()

    def verdict(self, error: Exception) -> str:
        """Who failed first, as far as can be known in bounded time, when this rank fails with `error`. Leaves word for others."""
        said: list[str] = []

        def ask() -> None:
            try:
                self._leave_word(error)
                said.append(self._judge())
                self._store.set(f"roll call, gone {self._rank}", "")
                if self._rank == 0:  # it may hold the store, which the others still need
                    self._wait_until(self._all_gone, _SILENCE_SECONDS + 2 * _BEAT_SECONDS)
            except RuntimeError:
                said.append("")

        thread = threading.Thread(target=ask, daemon=True)  # a store that hangs cannot be waited for with a limit
        thread.start()
        thread.join(self._patience + 2 * _SILENCE_SECONDS + _STORE_SECONDS)
        return (said and said[0]) or "nothing more is known: the store of the run is gone, which its rank 0 or its launcher holds"

    def _beat(self, store: dist.Store) -> None:
        number = 0
        while not self._ended.is_set():
            try:
                store.set(f"roll call, beat {self._rank}", str(number))
            except RuntimeError:
                return  # the store has gone
            number += 1
            self._ended.wait(_BEAT_SECONDS)

    def _leave_word(self, error: Exception) -> None:
        text = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
        word = {"by itself": not is_loss(error), "text": text, "time": time.time()}
        self._store.set(f"roll call, word {self._rank}", json.dumps(word))

    def _judge(self) -> str:
        """Wait until it is clear who failed."""
        heard = {rank: (self._read("beat", rank), time.monotonic()) for rank in range(self._world)}

        def silent(seconds: float) -> list[int]:
            """Ranks without a word whose beat has stood still for so long."""
            for rank in range(self._world):
                if (beat := self._read("beat", rank)) != heard[rank][0]:
                    heard[rank] = beat, time.monotonic()
            now = time.monotonic()
            return [rank for rank, (_, since) in heard.items() if now - since > seconds and self._read("word", rank) is None]

        def found() -> str:
            words = {rank: json.loads(word) for rank in range(self._world) if (word := self._read("word", rank))}
            own = {rank: word for rank, word in words.items() if word["by itself"]}
            if own:
                first = min(own, key=lambda rank: own[rank]["time"])
                return "this rank failed first" if first == self._rank else f"rank {first} failed first: {own[first]['text']}"
            if gone := silent(_SILENCE_SECONDS):
                return f"{_ranks(gone)} gave no sign of life for {_SILENCE_SECONDS:g} s: killed, or stopped"
            return ""

        verdict = self._wait_until(found, self._patience + _SILENCE_SECONDS)
        if verdict:
            return verdict
        waited_for = [rank for rank in range(self._world) if self._read("word", rank) is None]
        return f"only {_ranks(waited_for)} left no word: alive, and not going on" if waited_for else "no rank failed by itself"

    def _all_gone(self) -> bool:
        """Whether every rank has had its verdict."""
        return all(self._read("gone", rank) is not None for rank in range(self._world))

    def _read(self, what: str, rank: int) -> str | None:
        key = f"roll call, {what} {rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    @staticmethod
    def _wait_until(condition: Callable[[], Any], seconds: float) -> Any:
        """The condition's value as soon as it is true, or when the time is over."""
        deadline = time.monotonic() + seconds
        while not (value := condition()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return value


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or late, rather than what is wrong with this one."""
    return isinstance(error, PeerLostError | dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))} of the run"
