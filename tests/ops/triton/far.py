"""Programs at the far end of a grid that is too large to interpret, and memory that is large and empty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter


def sparse(path: Path, elements: int) -> Tensor:
    """[elements] zeros of float32 in a file with holes: what is never touched takes no space."""
    return torch.from_numpy(np.memmap(path, np.float32, "w+", shape=elements))


def run_last_programs(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, count: int) -> list[tuple[int, ...]]:
    """From now on the kernel of that name runs the last `count` programs of the first axis of its grid and no others.

    Returns a list that gets the grid of every launch.
    """
    kernel, grids = getattr(module, name), []
    set_place = interpreter.InterpreterBuilder.set_grid_idx

    class _Last:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(tuple(grid))
            whole, skipped = (*grid, 1, 1)[:3], max(0, grid[0] - count)

            def launch(*arguments: Any, **named: Any) -> None:
                with monkeypatch.context() as patch:
                    patch.setattr(
                        interpreter.InterpreterBuilder,
                        "set_grid_idx",
                        lambda self, x, y, z: set_place(self, x + skipped, y, z),
                    )
                    patch.setattr(
                        interpreter.InterpreterBuilder, "set_grid_dim", lambda self, *_: setattr(self, "grid_dim", whole)
                    )
                    kernel[(min(count, grid[0]), *grid[1:])](*arguments, **named)

            return launch

    monkeypatch.setattr(module, name, _Last())
    return grids
