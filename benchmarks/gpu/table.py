"""Markdown of a file that `all.py` wrote, for docs/performance.md: `python -m benchmarks.gpu.table FILE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

GOALS = (
    "memory-bound kernels at 85 % of the copy rate",
    "memory-bound kernels ahead of Liger",
    "cross-entropy of 131,072 both ways at least twice as fast as Liger",
    "attention at 8k, head size 128: 450 TFLOP/s forward, 350 backward",
    "attention `auto`: within 3 % of the best that is there",
    "training step: at least 55 % MFU",
    "training step: ahead of every peer",
)
ATTENTION = ("flash4", "flash3", "flash2", "varlen", "cudnn", "sdpa")


def document(result: dict[str, Any]) -> str:
    """All tables, and which goals hold; a smoke run's begin with a warning."""
    conditions, floor = result["conditions"], result["floors"]
    versions = [f"{name} {conditions[name]}" for name in ("torch", "cuda", "triton", "liger_kernel", "transformers")]
    text = [
        f"{conditions['date']}: {conditions['device']}; {', '.join(version for version in versions if 'None' not in version)}. "
        f"Floors in the same process: a copy moves {floor['bytes_per_second'] / 1e12:.2f} TB/s, an 8192^3 product in bfloat16 "
        f"makes {floor['flops_per_second'] / 1e12:.0f} TFLOP/s.",
        "",
    ]
    if conditions["smoke"]:
        text = ["**A smoke run: these figures mean nothing.**", "", *text]
    for part, entry in result["parts"].items():
        rows = _steps(entry) if part == "train_step" else _kernels(entry)
        text += [*rows, *([""] if rows else [])]
        text += [f"{name}: absent ({why})" for name, why in entry["absent"].items()] + ([""] if entry["absent"] else [])
    text += ["| goal | |", "|---|---|", *(f"| {goal} | {verdict} |" for goal, verdict in goals(result).items())]
    return "\n".join(text) + "\n"


def _kernels(entry: dict[str, Any]) -> list[str]:
    if not entry["cases"]:
        return []
    peers = list(dict.fromkeys(peer for case in entry["cases"] for peer in case["peers"]))
    rows = [
        f"| kernel | ms | rate | of the floor | largest error | {' | '.join(f'{peer} takes' for peer in peers)} |",
        f"|---|---|---|---|---|{'---|' * len(peers)}",
    ]
    for case in entry["cases"]:
        rate = f"{case['per_second'] / 1e9:,.0f} GB/s" if "bytes" in case else f"{case['per_second'] / 1e12:,.0f} TFLOP/s"
        others = [_ratio(case, peer) for peer in peers]
        auto = f" (auto: {case['notes']['auto']})" if "auto" in case["notes"] else ""
        wrong = f" WRONG: {', '.join(case['wrong'])}" if case["wrong"] else ""
        error = f"{max(case['errors'].values()):.1e}{wrong}"
        cells = [f"{case['name']}{auto}", f"{case['seconds'] * 1e3:.3f}", rate, f"{case['share']:.0%}", error, *others]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _ratio(case: dict[str, Any], peer: str) -> str:
    found = case["peers"].get(peer)
    if found is None:
        return ""
    return f"{found['seconds'] / case['seconds']:.2f}x" if "seconds" in found else "absent"


def _steps(entry: dict[str, Any]) -> list[str]:
    if not entry["cases"]:
        return []
    rows = ["| step | tokens/s | MFU | peak GiB | speed ratio, median (lowest - highest) |", "|---|---|---|---|---|"]
    for case in entry["cases"]:
        rows.append(f"| **{case['name']}** | {_speed(case['ours'])} | |")
        for peer, found in case["peers"].items():
            if "absent" in found:
                rows.append(f"| {peer} | absent: {found['absent']} | | | |")
                continue
            ratio = found["speed_ratio"]
            turns = "" if found["in_turns"] else ", one after the other"
            rows.append(
                f"| {peer} | {_speed(found)} | {ratio['median']:.2f} ({ratio['lowest']:.2f} - {ratio['highest']:.2f}{turns}) |"
            )
    return rows


def _speed(found: dict[str, Any]) -> str:
    mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
    return f"{found['tokens_per_second']:,.0f} | {mfu} | {found['peak_bytes'] / 2**30:.1f}"


def goals(result: dict[str, Any]) -> dict[str, str]:
    """What came of each: "holds", what breaks it, or "not measured"."""
    parts = result["parts"]
    kernels = {case["name"]: case for part, entry in parts.items() if part != "train_step" for case in entry["cases"]}
    bound = {name: case for name, case in kernels.items() if "bytes" in case}
    steps = parts.get("train_step", {"cases": []})["cases"]
    entropy = {"131,072": kernels.get("cross-entropy of 131,072 logits, both ways")}
    at_8k = {
        way: kernels.get(f"attention 8k {way}", {}).get("per_second", 0) / least
        for way, least in (("forward", 450e12), ("backward", 350e12))
        if f"attention 8k {way}" in kernels
    }
    found = (
        {name: case["share"] / 0.85 for name, case in bound.items()},
        {name: _times(case, "Liger") for name, case in bound.items()},
        {name: _half(_times(case, "Liger")) for name, case in entropy.items() if case},
        at_8k,
        {name: _picked(case) for name, case in kernels.items() if "auto" in case["notes"]},
        {case["name"]: None if case["ours"]["mfu"] is None else case["ours"]["mfu"] / 0.55 for case in steps},
        {
            f"{case['name']}, {peer}": other["speed_ratio"]["median"] if "speed_ratio" in other else None
            for case in steps
            for peer, other in case["peers"].items()
        },
    )
    return {goal: _verdict(values) for goal, values in zip(GOALS, found, strict=True)}


def _verdict(values: dict[str, float | None]) -> str:
    """values: what is reached, as a part of what should be; None: not measured."""
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return "not measured"
    missed = [f"{name}: {value:.2f} of it" for name, value in known.items() if value < 1]
    return "; ".join(missed) or "holds"


def _times(case: dict[str, Any], peer: str) -> float | None:
    seconds = case["peers"].get(peer, {}).get("seconds")
    return None if seconds is None else seconds / case["seconds"]


def _half(value: float | None) -> float | None:
    return None if value is None else value / 2


def _picked(case: dict[str, Any]) -> float | None:
    """How near the backend that `auto` takes is to the best, 3 % off being near enough."""
    every = {name: found["seconds"] for name, found in case["peers"].items() if name in ATTENTION and "seconds" in found}
    every["triton"] = case["seconds"]
    picked = every.get(case["notes"]["auto"])
    return None if picked is None else 1.03 * min(every.values()) / picked


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m benchmarks.gpu.table", description=__doc__)
    options.add_argument("file", type=Path, metavar="FILE")
    print(document(json.loads(options.parse_args().file.read_text())), end="")
