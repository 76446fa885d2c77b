"""Kernels run in Triton's interpreter here, repaired for bfloat16; with a GPU they are compiled, and these tests run on it."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.ops.triton import interpreter

    interpreter.repair()
