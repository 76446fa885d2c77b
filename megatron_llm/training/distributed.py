"""Ranks and devices: from the launcher's environment to a process group. Called by `training/loop.py`.

The only environment variables read in the project are the launcher's: RANK, WORLD_SIZE, LOCAL_RANK (torchrun).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from megatron_llm.training.agreement import AgreedError
from megatron_llm.training.roll_call import roll_call


def launched_world_size() -> int:
    """How many ranks the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """This rank's device: the GPU with the number of its local rank, or the CPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise ValueError(f"local rank {local} has no GPU: {torch.cuda.device_count()} visible; start fewer ranks per node")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def process_group(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """The default process group for the duration of a run: NCCL on GPUs, gloo on CPUs; none for a single process."""
    if launched_world_size() == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        with roll_call(timeout_seconds):
            yield
    except AgreedError:
        raise
    except ValueError as error:
        error.add_note(f"on rank {launched_rank()}")  # not every rank may have failed: this one must be heard
        raise
    # Not after a failure: NCCL would first wait for messages that no longer come. The process ends, and the group with it.
    dist.destroy_process_group()
