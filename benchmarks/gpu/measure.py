"""Checks a kernel against float64 and times it beside others. Called by `all.py` on the cases of the modules beside this one.

A case is timed alone on the device: what it reads is not in the level-2 cache (a larger buffer is written before every run), and
the host is ahead (the device waits a moment before every run), so that no launch is in the time. The figure is the median of
many runs. Rates are of the bytes that a kernel must move and the FLOPs that it must do, whatever it does beside; their share is
of floors measured in the same process: the rate of a copy and that of a matrix product.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
FLUSHED = 256 << 20  # bytes: several times the level-2 cache of any GPU
RUNS = (7, 100)  # the fewest and the most that are timed
SECONDS = 0.15  # of runs, if that many fit between
AHEAD = 300_000  # clock cycles that the device waits before a run, about 0.15 ms: the host queues the run meanwhile
ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        smoke: only to see that everything runs, in Triton's interpreter where there is no GPU: tiny, in float32 there.
    """

    device: torch.device
    smoke: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.smoke else real

    def randn(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, grad: bool = False) -> Tensor:
        values = torch.randn(shape, device=self.device, dtype=torch.float32).mul_(scale).to(dtype or self.dtype)
        return values.requires_grad_(grad)


@dataclass(frozen=True)
class Compared:
    """One result beside float64. roundings: to its own dtype on the way; wide: what is allowed of the largest value besides."""

    what: str
    actual: Tensor
    expected: Tensor
    roundings: float = 2.0
    wide: float = 1e-5


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        ours: runs it once, on operands that stay; peers: make the same of others, and may raise ImportError if they are not here.
        check: what it makes of fresh operands, beside float64.
        bytes, flops: the least that must be moved, or done: the one of both that bounds it. notes: for the reader.
    """

    ours: Run
    check: Callable[[], Iterable[Compared]]
    peers: Mapping[str, Callable[[], Run]] = field(default_factory=dict)
    bytes: float = 0.0
    flops: float = 0.0
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert bool(self.bytes) != bool(self.flops)


Cases = dict[str, Callable[[], Case]]
"""By name, what makes it: nothing is allocated before its turn, and one whose kernel is missing takes no other with it."""


@dataclass(frozen=True)
class Floors:
    """bytes_per_second: read and written by a copy of 1 GiB; flops_per_second: of an 8192^3 product in bfloat16."""

    bytes_per_second: float
    flops_per_second: float


def floors(setting: Setting) -> Floors:
    """Measured here and now."""
    elements = setting.size(1 << 29, 1 << 12)
    source = torch.zeros(elements, device=setting.device, dtype=torch.bfloat16)
    copy = seconds(partial(torch.empty_like(source).copy_, source), setting)
    del source
    n = setting.size(8192, 64)
    a, b = setting.randn(n, n), setting.randn(n, n)
    out = torch.empty_like(a)
    product = seconds(partial(torch.mm, a, b, out=out), setting)
    return Floors(4.0 * elements / copy, 2.0 * n**3 / product)


def seconds(run: Run, setting: Setting) -> float:
    """The median of one run, after some that are not counted."""
    if setting.device.type != "cuda":
        return _seconds_on_a_cpu(run)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = time.perf_counter() - begin
    runs = int(min(max(SECONDS / max(once, 1e-6), RUNS[0]), RUNS[1]))
    cache = torch.empty(FLUSHED, dtype=torch.int8, device=setting.device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, stop in events:
        cache.zero_()
        torch.cuda._sleep(AHEAD)
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3


def _seconds_on_a_cpu(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def compare(found: Iterable[Compared]) -> dict[str, Any]:
    """The largest error of each result relative to its largest value, and which of them are further off than they may be."""
    errors, off = {}, []
    for one in found:
        expected = one.expected.to(one.actual.device)
        assert expected.dtype is torch.float64 and expected.shape == one.actual.shape, one.what
        error, largest = (one.actual.double() - expected).abs_(), expected.abs().max()
        errors[one.what] = float(error.max() / largest)
        allowed = one.wide * largest + one.roundings * ULP[one.actual.dtype] * expected.abs()
        if not bool((error <= allowed).all()):  # also of nan
            off.append(one.what)
    return {"errors": errors, "wrong": off}


def measured(name: str, case: Case, setting: Setting, floor: Floors, left: Callable[[], float]) -> dict[str, Any]:
    """The case's entry in the JSON. left: seconds that there still are; without any peers are left out, and say so."""
    result: dict[str, Any] = {"name": name, **compare(case.check()), **_rates(case, seconds(case.ours, setting), floor)}
    result |= {"notes": dict(case.notes), "peers": {}}
    for peer, make in case.peers.items():
        if left() <= 0:
            result["peers"][peer] = {"absent": "no time was left"}
            continue
        try:
            result["peers"][peer] = {"seconds": seconds(make(), setting)}
        except Exception as error:  # another's package: whatever it does, our figures stay
            result["peers"][peer] = {"absent": reason(error)}
        free(setting)
    return result


def _rates(case: Case, took: float, floor: Floors) -> dict[str, Any]:
    amount, best = (case.bytes, floor.bytes_per_second) if case.bytes else (case.flops, floor.flops_per_second)
    return {
        "seconds": took,
        "bytes" if case.bytes else "flops": amount,
        "per_second": amount / took,
        "share": amount / took / best,
    }


def reason(error: BaseException) -> str:
    """One line of it."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return lines[0][:200]


def free(setting: Setting) -> None:
    """Memory of the case before this one."""
    if setting.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def gradient(outputs: Tensor | tuple[Tensor, ...], inputs: list[Tensor], grads: Tensor | tuple[Tensor, ...]) -> Run:
    """A backward that can be run again and again."""
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for these shapes alone; without a GPU not by its compiler, which would take minutes."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend="inductor" if torch.cuda.is_available() else "aot_eager")
