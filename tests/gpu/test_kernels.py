"""Kernels compiled and at real sizes on a GPU: those of `benchmarks/gpu` against float64, and a whole model of them.

Their tests in `tests/ops/triton` run on a GPU, too: `pytest -m gpu tests/gpu` and `pytest tests/ops/triton`.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu.measure import Setting, compare, free
from megatron_llm.ops.activation import gated
from tests.gpu.shared_gpu import ROOT
from tests.gpu.test_engine import losses
from tests.runs import config_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
PARTS = ("norm", "rope", "activation", "cross_entropy", "optimizer", "attention")
GPU = torch.device("cuda")


@pytest.mark.parametrize("part", PARTS)
def test_kernels_are_float64s_at_real_sizes(part: str) -> None:
    setting, wrong = Setting(GPU), {}
    for name, make in importlib.import_module(f"benchmarks.gpu.{part}").cases(setting).items():
        found = compare(make().check())
        if found["wrong"]:
            wrong[name] = found
        free(setting)
    assert wrong == {}


def test_kernels_are_compiled_here() -> None:
    """Nothing of the environment has them interpreted."""
    from megatron_llm.ops.triton import interpreted

    assert "TRITON_INTERPRET" not in os.environ and not interpreted()


def test_the_tests_of_kernels_run_on_the_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/ops/triton", "--deselect", "tests/ops/triton/test_compiled.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("compute, tolerance", [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_training_with_all_kernels_equals_torch(compute: str, tolerance: float) -> None:
    """auto takes Triton's wherever it has one; attention, whose head size must suit a kernel, by name."""
    names = ("norm", "rope", "activation", "cross_entropy", "embedding", "optimizer")
    sections = {"optimizer": {"lr": 1e-3}, "precision": {"compute": compute}}
    expected = losses(config_of(**sections, kernels=dict.fromkeys(names, "torch") | {"attention": "sdpa"}), "cuda")
    fused = dict.fromkeys(names, "triton") | {"attention": "triton"}
    assert losses(config_of(**sections, kernels=fused), "cuda") == [pytest.approx(pair, rel=tolerance) for pair in expected]


def test_torch_compile_goes_around_an_operator() -> None:
    x = torch.randn(64, 256, device=GPU, dtype=torch.bfloat16, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return gated(x * 2, "silu", "triton").sin()

    compiled = torch.compile(function, fullgraph=True)
    expected, actual = function(x), compiled(x)
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
    given = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, x, given)[0] for y in (expected, actual)]
    torch.testing.assert_close(*gradients, atol=5e-2, rtol=5e-2)


def test_attention_twice_gives_the_same_bits() -> None:
    from megatron_llm.ops.attention import attention

    cu = (0, 1, 700, 701, 2048)
    q, k, v = (torch.randn(cu[-1], heads, 128, device=GPU, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2))
    do = torch.randn_like(q)
    runs = []
    for _ in range(2):
        o = attention(q, k, v, cu, cu, "triton", deterministic=True)
        runs.append((o, *torch.autograd.grad(o, (q, k, v), do)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
