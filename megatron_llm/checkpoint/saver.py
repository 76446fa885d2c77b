"""Saving behind the training steps. A run has one `Saver`; called by `training/loop.py` and `training/recovery.py`.

Training stands still while a rank's share is copied to host memory. A thread of each rank writes the copy while the next
steps run, and then a thread of rank 0 commits. Nothing is exchanged from these threads: whether they are done travels with the
loss of each step (`ready`), and when it is true of all ranks, all go on to the next stage together (`advance`). So ranks never
disagree about how far a save is, NCCL sees no second thread, and an error on one rank ends the run on all in the same step.

    start     prepare; copy; begin to write       collective
    advance   written everywhere: begin to commit, then: committed       collective, only if all ranks are `ready`
    finish    the same, waiting                   collective; before the next save, before going back, at the end
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

import torch

from megatron_llm.checkpoint.save import Contents, RankFile, TensorToSave, commit, on_all, prepare, write_rank_file
from megatron_llm.checkpoint.work import Work
from megatron_llm.ops.storage import Folder
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.objects import gather_objects_to_first

logger = logging.getLogger("megatron_llm")
_ALIGNMENT = 64


class Saver:
    """Writes one checkpoint at a time.

    Args:
        asynchronous: copy and go on; otherwise a save is committed when `start` returns.
        committed: called on rank 0 with the folder after each commit, in the thread that committed.
        progress: called often, with the part that is written, while training waits for a save that makes headway.
    """

    def __init__(
        self,
        world: Axis,
        asynchronous: bool,
        committed: Callable[[Folder], None],
        progress: Callable[[float], object] = lambda _: None,
    ):
        self._world, self._asynchronous, self._committed, self._progress = world, asynchronous, committed, progress
        self._work: Work | None = None  # of the stage that a save is in
        self._writing = False  # it is the first of the two
        self._staging = Staging()
        self._stall = 0.0

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._work is not None

    @property
    def ready(self) -> bool:
        """Whether this rank has done its part of the stage that a save is in."""
        return self._work is not None and self._work.done

    def start(self, folder: Folder, tensors: Iterable[TensorToSave], contents: Contents, wait: bool = False) -> None:
        """Begin to save, when the save before has been committed. Collective.

        wait: the run ends here; nothing is copied, and the save is committed when this returns.

        Raises SaveError on all ranks, for the save before as well.
        """
        self.finish()
        start = time.perf_counter()
        self._folder, self._contents, self._started = folder, contents, start
        on_all(self._world, folder, lambda: prepare(folder, contents) if self._world.first else None)
        behind = self._asynchronous and not wait
        mine = list(tensors)
        error: Exception | None = None
        try:
            mine = self._staging.copy(mine) if behind else mine
        except Exception as caught:  # no memory: all ranks learn of it when they ask what came of the writing
            error = caught

        def write(progress: Callable[[int], None]) -> RankFile | None:
            if error is not None:
                raise error
            return write_rank_file(folder, self._world.rank, mine, progress)

        self._writing, self._work = True, Work(write, sum(item.tensor.nbytes for item in mine))
        self._stall += time.perf_counter() - start
        if not behind:
            self.finish()

    def advance(self) -> None:
        """Go on to the next stage when all ranks are `ready`. Collective; raises SaveError."""
        start = time.perf_counter()
        assert self._work is not None
        mine = on_all(self._world, self._folder, self._work.result)
        if self._writing:
            files = gather_objects_to_first(mine, self._world)
            self._writing, self._work = False, Work(lambda progress: self._commit(files, progress))
        else:
            self._work = None
        self._stall += time.perf_counter() - start

    def finish(self) -> None:
        """Return when no save is under way any more. Collective; raises SaveError."""
        while self._work is not None:
            start = time.perf_counter()
            self._work.wait_for_all(self._world, self._progress)
            self._stall += time.perf_counter() - start
            self.advance()

    def abandon(self) -> None:
        """Let a save that cannot be committed any more end soon; what it wrote is no checkpoint."""
        if self._work is not None:
            self._work.abandon()

    def stall_seconds(self) -> float:
        """Seconds that training stood still for saves, since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def _commit(self, files: list[RankFile | None], progress: Callable[[int], None]) -> None:
        if not self._world.first:
            return
        commit(self._folder, files, self._contents)
        progress(0)
        size = sum(file.written.bytes for file in files if file)
        logger.info("saved %s: %.3f GB in %.1f s", self._folder, size / 1e9, time.perf_counter() - self._started)
        self._committed(self._folder)


class Staging:
    """Host memory for a copy of what a rank saves, kept for the next save; page-locked for a GPU, which halves the time."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    def copy(self, tensors: list[TensorToSave]) -> list[TensorToSave]:
        """The same with copies of the tensors, which hold until the next call. Returns when they are complete."""
        offsets, end = [], 0
        for item in tensors:
            offsets.append(end)
            end += -(-item.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        device = next((item.tensor.device for item in tensors if item.tensor.is_cuda), None)
        if self._buffer.numel() < end:
            self._grow(end, device)
        copies = []
        for item, offset in zip(tensors, offsets, strict=True):
            flat = self._buffer[offset : offset + item.tensor.nbytes].view(item.tensor.dtype)
            copies.append(replace(item, tensor=flat.view(item.tensor.shape).copy_(item.tensor.detach(), non_blocking=True)))
        if device is not None:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _grow(self, size: int, device: torch.device | None) -> None:
        """Get a larger buffer; page-locked, and of exactly this size: torch's own allocator would take a power of two."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
            self._locked = False
        self._buffer = torch.empty(0, dtype=torch.uint8)  # gone before the larger one is there
        self._buffer = torch.empty(size, dtype=torch.uint8)
        if device is None:
            return
        error = torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), size, 0)
        self._locked = int(error) == 0
        if not self._locked:
            with suppress(RuntimeError):  # or the next kernel would be blamed for it
                torch.zeros(1, device=device)
            logger.warning("%.1f GB of host memory for checkpoints could not be page-locked (%s)", size / 1e9, error)
