"""Claim: AdamW with bfloat16 compute weights is at least as fast as torch's fused AdamW and a pass that rounds.

One flat run of parameters on one device. The peer is `torch.optim.AdamW(fused=True)` on a float32 master, with a factor on the
gradient as GradScaler gives it, then a pass that rounds the master to the compute weights. Ours and the peer run in turn, the
order swapped every time; the figure is the median of the ratios of the pairs. Beside it: the bytes that an update must move per
parameter, and how many of them it moves a second.

Bytes per parameter that any implementation must move, each tensor read or written once: float32 gradient, read 4; float32
master, read and written 8; float32 moment, read and written 8, in bfloat16 4; bfloat16 compute weights, written 2.

    adamw                               4 + 8 + 2 x 8     = 28   float32 compute: the master is the weight
    adamw, bfloat16 weights             4 + 8 + 2 x 8 + 2 = 30
    adamw, bfloat16 weights and state   4 + 8 + 2 x 4 + 2 = 22
    lion, bfloat16 weights              4 + 8 + 8 + 2     = 22
    lion, bfloat16 weights and state    4 + 8 + 4 + 2     = 18
    sgd, as lion                                            22 and 18

The peer moves 28, and 6 more to read the master again and write the compute weights. Not counted: torch's fused kernel, the
peer's and ours, writes the scaled gradient back (4), and so do lion and sgd; and a processor may read a line before it writes it.

    python benchmarks/update.py [--elements 33554432] [--pairs 7] [--threads 2] [--device cpu] [--output FILE]

Writes nothing without --output. Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import finish, machine, parser

from megatron_llm.ops.adamw import adamw_
from megatron_llm.ops.lion import lion_
from megatron_llm.ops.rounding import StochasticRounding
from megatron_llm.ops.sgd import sgd_

ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
RULES: dict[str, tuple[Callable[..., None], int, dict[str, Any]]] = {  # function, moments, settings
    "adamw": (adamw_, 2, {**ADAMW, "update": 10}),
    "lion": (lion_, 1, {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}),
    "sgd": (sgd_, 1, {"lr": 1e-4, "momentum": 0.9, "weight_decay": 0.1}),
}
CLAIMED = "adamw, bfloat16 weights"


def options() -> dict[str, tuple[str, torch.dtype | None, torch.dtype]]:
    """Name -> (rule, dtype of compute weights if they are apart from the master, dtype of moments)."""
    made: dict[str, tuple[str, torch.dtype | None, torch.dtype]] = {"adamw": ("adamw", None, torch.float32)}
    for rule in RULES:
        made[f"{rule}, bfloat16 weights"] = (rule, torch.bfloat16, torch.float32)
        made[f"{rule}, bfloat16 weights and state"] = (rule, torch.bfloat16, torch.bfloat16)
    return made


def bytes_moved(rule: str, out: torch.dtype | None, state: torch.dtype) -> int:
    """Per parameter, as counted above."""
    return 4 + 8 + RULES[rule][1] * 2 * state.itemsize + (0 if out is None else out.itemsize)


def ours(rule: str, out: torch.dtype | None, state: torch.dtype, elements: int, device: torch.device) -> Callable[[], None]:
    """One update of a run of elements."""
    function, moments, settings = RULES[rule]
    weights, gradient = (torch.randn(elements, device=device) for _ in range(2))
    state_tensors = [torch.zeros(elements, dtype=state, device=device) for _ in range(moments)]
    rounded = None if out is None else torch.empty(elements, dtype=out, device=device)
    rounding = StochasticRounding(1, 0) if state is torch.bfloat16 else None
    return lambda: function(weights, gradient, *state_tensors, out=rounded, scale=1.0, rounding=rounding, **settings)


def peer(elements: int, device: torch.device) -> Callable[[], None]:
    """torch's AdamW on a float32 master, then the rounding of the compute weights."""
    master = torch.nn.Parameter(torch.randn(elements, device=device))
    master.grad = torch.randn(elements, device=device)
    optimizer = torch.optim.AdamW([master], fused=True, **ADAMW)
    optimizer.grad_scale = torch.ones((), device=device)  # type: ignore[attr-defined]
    rounded = torch.empty(elements, dtype=torch.bfloat16, device=device)

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        rounded.copy_(master)

    return update


def timed(update: Callable[[], None], device: torch.device) -> float:
    """Seconds of one update, the work of the device included."""
    start = time.perf_counter()
    update()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(mine: Callable[[], None], other: Callable[[], None], pairs: int, device: torch.device) -> list[tuple[float, float]]:
    """(their seconds, our seconds) of each pair, after one of each that is not counted."""
    timed(mine, device), timed(other, device)
    measured = []
    for number in range(pairs):
        if number % 2:
            own, theirs = timed(mine, device), timed(other, device)
        else:
            theirs, own = timed(other, device), timed(mine, device)
        measured.append((theirs, own))
    return measured


def main() -> int:
    """Measure, print a table, write the JSON where asked."""
    made = parser(__doc__)
    made.set_defaults(output=None)
    made.add_argument("--elements", type=int, default=1 << 25, help="parameters in the run (default: %(default)s)")
    made.add_argument("--pairs", type=int, default=7, help="timed pairs of updates for each option (default: %(default)s)")
    made.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda:0 (default: %(default)s)")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    conditions = machine("torch", threads=args.threads, device=device)

    figures: dict[str, dict[str, Any]] = {}
    theirs = peer(args.elements, args.device)
    print(f"{'':36} {'bytes':>5} {'ms':>9} {'GB/s':>7} {'peer, ms':>9} {'ratio':>6}  lowest - highest")
    for name, (rule, out, state) in options().items():
        pairs = measure(ours(rule, out, state, args.elements, args.device), theirs, args.pairs, args.device)
        ratios = sorted(other / own for other, own in pairs)
        other, own = (statistics.median(column) for column in zip(*pairs, strict=True))
        moved = bytes_moved(rule, out, state)
        figures[name] = {
            "bytes_per_parameter": moved,
            "seconds": own,
            "gigabytes_per_second": moved * args.elements / own / 1e9,
            "peer_seconds": other,
            "ratio": {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
            "seconds_of_pairs": pairs,
        }
        print(
            f"{name:36} {moved:5} {own * 1e3:9.2f} {figures[name]['gigabytes_per_second']:7.1f} {other * 1e3:9.2f} "
            f"{statistics.median(ratios):6.2f}  {ratios[0]:.2f} - {ratios[-1]:.2f}",
            flush=True,
        )
    holds = figures[CLAIMED]["ratio"]["median"] >= 1.0
    if args.output is None:
        return 0 if holds else 1
    return finish(
        args.output,
        "AdamW with bfloat16 weights is at least as fast as torch's fused AdamW and a pass that rounds",
        holds,
        conditions,
        elements=args.elements,
        options=figures,
    )


if __name__ == "__main__":
    sys.exit(main())
