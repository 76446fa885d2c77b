"""Reads the two pickles of a `torch_dist` folder without running anything they say.

`.metadata` is a plain pickle of torch.distributed.checkpoint's objects, `common.pt` a torch.save file with the arguments of
a run. A pickle names functions and classes to call. Here every name that real files contain leads to an inert stand-in that
keeps what it is given; any other name is refused. So neither torch's internals nor megatron are needed to read one.

Called by `torch_dist.py`.
"""

from __future__ import annotations

import argparse
import collections
import pickle
from functools import cache
from pathlib import Path
from typing import Any

_INERT_MODULES = ("torch.distributed.", "megatron.")
_INERT_NAMES = (
    "builtins.getattr",  # how some versions of Python pickle a member of an enum
    "io.BytesIO",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib._local.Path",
    "pathlib._local.PosixPath",
    "signal.Signals",
    "torch.serialization._get_layout",
    "types.SimpleNamespace",
)
_DAMAGED = (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, EOFError, OSError)


class Record:
    """Stands for an object of a class that is not wanted here: keeps the arguments and the state, does nothing."""

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> Record:
        record = super().__new__(cls)
        record.args = args
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, field: str) -> Any:
        """A field of the object that this stands for. Raises TypeError or KeyError if it has none of that name."""
        return self.state[field]


@cache
def _stand_in(qualified: str) -> type[Record]:
    return type(qualified.rpartition(".")[2], (Record,), {})


def _inert(qualified: str) -> bool:
    return qualified in _INERT_NAMES or qualified.startswith(_INERT_MODULES)


class _MetadataUnpickler(pickle.Unpickler):
    """Makes numbers, strings, containers, sizes, dtypes and `Record`s, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        qualified = f"{module}.{name}"
        if qualified == "torch.Size":
            return tuple
        if qualified in ("collections.OrderedDict", "builtins.set"):
            return collections.OrderedDict if name == "OrderedDict" else set
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout, torch.memory_format)):
            return getattr(torch, name)
        if _inert(qualified):
            return _stand_in(qualified)
        raise _RefusedName(qualified)


class _RefusedName(Exception):
    """A pickle asks for something that no checkpoint's metadata contains."""


def load_metadata(path: Path) -> Record:
    """The `Metadata` object of a `.metadata` file, as a `Record`.

    Raises ValueError naming the file if it is damaged, or contains what is not metadata (which is not executed).
    """
    with path.open("rb") as file:
        try:
            found = _MetadataUnpickler(file).load()
        except _RefusedName as error:
            raise ValueError(
                f"{path} asks for {error}, which is no part of a checkpoint's metadata; nothing was executed. "
                "Do not use this checkpoint unless you know who wrote it"
            ) from None
        except _DAMAGED as error:
            size = path.stat().st_size
            raise ValueError(f"{path} is truncated or damaged ({size} bytes; {type(error).__name__}: {error})") from error
    if not isinstance(found, Record) or type(found).__name__ != "Metadata":
        raise ValueError(f"{path} holds a {type(found).__name__}, expected torch.distributed.checkpoint's Metadata")
    return found


def load_common(path: Path) -> dict[str, Any]:
    """The content of `common.pt`: `args` (argparse.Namespace), `iteration` and more; objects of megatron become `Record`s.

    Raises ValueError naming the file if it is damaged, and each name that it may not contain.
    """
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = sorted(name for name in names if name != "argparse.Namespace" and not _inert(name))
        if refused:
            raise ValueError(
                f"it needs {', '.join(refused)}, which could run code and is not loaded. Give the architecture as a Hugging "
                "Face folder with --config HF_DIR; this file is then not needed"
            )
        allowed: list[Any] = [argparse.Namespace, *((_stand_in(name), name) for name in names if _inert(name))]
        with torch.serialization.safe_globals(allowed):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a dictionary")
    return found
