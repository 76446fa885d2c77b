"""Every kernel as it is launched, compiled for GPUs that are not here: no spills, memory that fits, wide loads, tensor cores.

One process compiles what of this module is to run, on all cores (`compiler.py`): in this one kernels may be interpreted.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ops.triton.broken import CASES as BROKEN
from tests.ops.triton.compiler import Case, cases, label

ROOT = Path(__file__).parents[3]
SECONDS = 840  # on a machine with other work to do
pytestmark = pytest.mark.timeout(SECONDS + 60)


def _param(case: Case, arch: int) -> Any:
    """Of the slowest to compile, attention's, only the commonest are in `make test` on every architecture."""
    later = [pytest.mark.slow] if case.tensor_cores and arch != 90 and "D=128 plain" not in case.name else []
    return pytest.param(case, arch, id=label(case, arch), marks=later)


CASES = [_param(case, arch) for case in cases() for arch in case.archs]
EXPECTED = {
    "broken: spills": "spill registers",
    "broken: shared memory": "bytes of shared memory",
    "broken: no warpgroups": "0 matrix products of warpgroups",
    "broken: narrow loads": "loads are of 16 bytes",
    "broken: not compiled": "not compiled: KeyError",
}

Results = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Results:
    """What the compiler found, by case and architecture."""
    params = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    mine = [one for one in params if "case" in one]
    labels = [label(one["case"], arch) for one in mine for arch in ([one["arch"]] if "arch" in one else one["case"].archs)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.triton.compiler", *labels]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=SECONDS)
    assert done.returncode == 0
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(result["case"], result["arch"]): result for result in found}


@pytest.mark.parametrize("case, arch", CASES)
def test_fits_the_gpu(results: Results, case: Case, arch: int) -> None:
    assert results[case.name, arch]["problems"] == []


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_what_does_not_is_found(results: Results, case: Case) -> None:
    for arch in case.archs:
        assert any(EXPECTED[case.name] in problem for problem in results[case.name, arch]["problems"])


@pytest.mark.parametrize("kernel", sorted({case.kernel for case in cases()}))
def test_the_size_of_a_micro_batch_makes_no_kernels(kernel: str) -> None:
    """One that is loaded in the middle of a run may wait for the GPU: what counts tokens must not be specialized (as 1, as a
    multiple of 16). Kernels without such an argument get it by their grid.
    """
    module, name = kernel.split(":")
    fn = getattr(importlib.import_module(f"megatron_llm.ops.triton.{module}"), name)
    unspecialized = fn.kwargs["do_not_specialize"] if hasattr(fn, "kwargs") else fn.do_not_specialize
    counts = {"T", "blocks"} if kernel == "norm:backward_kernel" else {"T", "tokens", "blocks"}
    assert counts & set(fn.arg_names) <= set(unspecialized or ())


def test_names_are_unique() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))
