"""All kernels and a training step, on one GPU: checked against float64, timed beside others, in one JSON file.

    python -m benchmarks.gpu.all [--out FILE] [--only PART ...] [--minutes 9] [--smoke]

Parts: activation, norm, rope, attention, cross_entropy, optimizer, train_step. Each has its share of the time; when it is over,
other implementations are left out first. The file is written after every case, and keeps what other parts have in it, so that a
run which is cut short, or several with --only, make one file. `python -m benchmarks.gpu.table FILE` prints it for
docs/performance.md. Packages that are not installed are absent in it. --smoke: tiny, without a GPU in Triton's interpreter; its
figures mean nothing.

Exits 1 if a kernel is wrong, or a part fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

PARTS = {"norm": 1.0, "rope": 0.6, "activation": 0.8, "cross_entropy": 1.2, "optimizer": 0.6, "attention": 2.5, "train_step": 6.0}
"""By name, which share of the time each has."""


def main(arguments: list[str]) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json, with --smoke runs/gpu_smoke.json")
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    options.add_argument("--minutes", type=float, default=9.0, help="of all parts together (default: %(default)s)")
    options.add_argument("--smoke", action="store_true")
    chosen = options.parse_args(arguments)
    return run(out_file(chosen.out, chosen.smoke), chosen.only, chosen.minutes, chosen.smoke)


def out_file(given: Path | None, smoke: bool) -> Path:
    """A smoke run, whose figures mean nothing, would begin the file of the figures anew."""
    return given or Path("runs/gpu_smoke.json" if smoke else "benchmarks/results/gpu.json")


def run(out: Path, parts: list[str], minutes: float, smoke: bool) -> int:
    import torch

    if not torch.cuda.is_available():
        if not smoke:
            print("there is no GPU; --smoke shows that everything runs", file=sys.stderr)
            return 2
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    from benchmarks.gpu.measure import Setting, floors

    begin = time.monotonic()
    setting = Setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"), smoke)
    result = _conditions(out, setting)
    floor = floors(setting)
    result["floors"] = asdict(floor)
    _say(f"copy {floor.bytes_per_second / 1e12:.2f} TB/s, product {floor.flops_per_second / 1e12:.0f} TFLOP/s")
    parts = [part for part in PARTS if part in parts]
    for number, part in enumerate(parts):
        left = minutes * 60 - (time.monotonic() - begin)
        end = time.monotonic() + left * PARTS[part] / sum(PARTS[other] for other in parts[number:])
        entry: dict[str, Any] = {"cases": [], "absent": {}}
        result["parts"][part] = entry

        def save() -> None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")

        measure = _training if part == "train_step" else _kernels
        measure(part, setting, floor, entry, lambda end=end: end - time.monotonic(), save)
        save()
    _say(f"written to {out}, after {time.monotonic() - begin:.0f} s")
    return 1 if any(_failed(result["parts"][part]) for part in parts) else 0


def _conditions(out: Path, setting: Any) -> dict[str, Any]:
    """What figures depend on, and those of an earlier run in the same file, if it was under the same conditions."""
    import torch

    from benchmarks.common import machine

    name = torch.cuda.get_device_name() if setting.device.type == "cuda" else "cpu"
    packages = ("torch", "triton", "liger_kernel", "flash_attn", "flash_attn_4", "transformers", "torchtitan")
    conditions = machine(*packages, device=name, cuda=torch.version.cuda, smoke=setting.smoke)
    same = ("torch", "triton", "device", "smoke")
    if out.exists():
        earlier: dict[str, Any] = json.loads(out.read_text())
        if all(earlier["conditions"].get(key) == conditions[key] for key in same):
            return earlier | {"conditions": conditions}
        _say(f"{out} is of other conditions and begun anew")
    return {"conditions": conditions, "parts": {}}


def _kernels(
    part: str, setting: Any, floor: Any, entry: dict[str, Any], left: Callable[[], float], save: Callable[[], None]
) -> None:
    """The cases of a module, one after another."""
    from benchmarks.gpu.measure import free, measured, reason

    cases = importlib.import_module(f"benchmarks.gpu.{part}").cases(setting)
    budget = left()
    for number, (name, make) in enumerate(cases.items()):
        # A case has its share of what is left; what it does not use the next ones have.
        until = left() - left() / (len(cases) - number)
        try:
            entry["cases"].append(measured(name, make(), setting, floor, lambda until=until: left() - until))
            _say(f"{part} {number + 1}/{len(cases)}, {budget - left():.0f} of {budget:.0f} s: {_line(entry['cases'][-1])}")
        except Exception as error:
            entry["absent"][name] = reason(error)
            _say(f"{part} {number + 1}/{len(cases)}: {name} is absent: {reason(error)}")
        free(setting)
        save()


def _training(
    part: str, setting: Any, floor: Any, entry: dict[str, Any], left: Callable[[], float], save: Callable[[], None]
) -> None:
    from benchmarks.gpu import train_step

    train_step.measure_all(setting, entry, left, save, _say)


def _line(case: dict[str, Any]) -> str:
    others = [f"{peer} {found['seconds'] / case['seconds']:.2f}x" for peer, found in case["peers"].items() if "seconds" in found]
    wrong = f"; WRONG: {', '.join(case['wrong'])} {case['errors']}" if case["wrong"] else ""
    own = f"{case['name']} {case['seconds'] * 1e3:.3f} ms, {case['share']:.0%} of the floor"
    return f"{own}; times of others: {', '.join(others)}{wrong}"


def _failed(entry: dict[str, Any]) -> bool:
    """Something is wrong, or failed otherwise than by not being there."""
    missing = ("ModuleNotFoundError", "ImportError")
    return any(case.get("wrong") for case in entry["cases"]) or not all(
        why.startswith(missing) for why in entry["absent"].values()
    )


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
