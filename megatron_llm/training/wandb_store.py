"""What a W&B run has on disk: a process that is killed takes with it what W&B's service had not written yet (up to 32 KB).

W&B keeps every run, online ones too, in `wandb/*run-*-ID/run-ID.wandb`: records of its protobufs in LevelDB's log format (its
description: leveldb/doc/log_format.md), after 7 bytes of its own. Called by `training/sinks.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import struct
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7
_WHOLE, _LAST = 1, 4
_TEARDOWN_SECONDS = 5.0


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of history in a .wandb file: names and values, and W&B's own count `_step`."""
    for record in records(file):
        if record.HasField("history"):
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file, up to where it breaks off."""
    from google.protobuf.message import DecodeError

    internal: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, place, parts = file.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(data):
        if (left := _BLOCK - place % _BLOCK) < _HEADER:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + _HEADER : place + _HEADER + size]
        place += _HEADER + size
        if kind in (_WHOLE, _LAST):
            try:
                yield internal.Record.FromString(parts)
            except DecodeError:
                return
            parts = b""


def last_row(folder: Path, run_id: str) -> dict[str, Any] | None:
    """The last row that the starts of a run have left in `folder`; one of step -1 if none has; None without their files."""
    files = list(folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"))
    for file in sorted(files, key=lambda file: file.parent.name.split("run-")[1], reverse=True):  # by the time in the name
        if rows := deque(rows_of(file), maxlen=1):
            return rows[0]
    return {"step": -1, "_step": -1} if files else None


def end_service() -> None:
    """End W&B's service, a child of this process: when Python ends, W&B waits for it, and it for the network, without a limit."""
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread, or the child, has ended
            for child in children.read_text().split():
                if Path(f"/proc/{child}/comm").read_text().startswith("wandb-core"):
                    os.kill(int(child), signal.SIGKILL)
    # Takes back what W&B would do when Python ends, and fail in.
    last = threading.Thread(target=_teardown, daemon=True)
    last.start()
    last.join(_TEARDOWN_SECONDS)


def _teardown() -> None:
    with contextlib.suppress(BaseException):
        importlib.import_module("wandb").teardown()
