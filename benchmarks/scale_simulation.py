"""Claim: the model of `plan --device` predicts two published steps of Llama-3.1 405B, on 8,192 and 16,384 GPUs, within 15 %.

Nothing here is measured but what others published. The steps of Llama-3.1 8B, 70B and 405B are predicted on 8 to 16,384 H100, in
the layout that should be fastest at each number: strong scaling, where the tokens of a step stay the same, and weak scaling,
where they grow with the GPUs. The figure is docs/scale.png (`scale_figure.py`), docs/performance.md reads it.

    python benchmarks/scale_simulation.py [--smoke] [--figure docs/scale.png]

Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import finish, machine, parser

from megatron_llm.config import Config, parse_config
from megatron_llm.planning.compare import GIB, Candidate, candidate
from megatron_llm.planning.flops import model_flops_per_token
from megatron_llm.planning.hardware import DEVICES
from megatron_llm.planning.layouts import rank_layouts, shares
from megatron_llm.planning.step_time import Modelled
from megatron_llm.training.resolve import layout_problems

TOLERANCE = 0.15
LENGTH = 8192
WORLDS = [2**n for n in range(3, 15)]
LEFT_OUT = (
    "stragglers, failures and restarts, checkpoint and evaluation stalls, data loading, launches and the host, contention and "
    "topology of the network beyond the node, congestion between axes, warm-up, variation between steps"
)


@dataclass(frozen=True)
class Llama:
    """A model and its batches: rows of a step in strong scaling; rows a GPU in weak scaling."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    rows: int
    rows_per_gpu: int

    def config(self, rows: int, length: int = LENGTH, **parallel: Any) -> Config:
        return parse_config(
            {
                "model": {
                    "hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
                    "num_attention_heads": self.heads, "num_key_value_heads": 8, "vocab_size": 128_256,
                },
                "parallel": parallel,
                "data": {"kind": "synthetic"},
                "training": {"sequence_length": length, "micro_batch_size": 1, "global_batch_size": rows, "steps": 1},
                "optimizer": {"lr": 1e-4},
                "precision": {"compute": "bfloat16"},
                "device": "cuda",
            }
        )  # fmt: skip


MODELS = [
    Llama("8B", 4096, 14_336, 32, 32, rows=512, rows_per_gpu=8),
    Llama("70B", 8192, 28_672, 80, 64, rows=512, rows_per_gpu=2),
    Llama("405B", 16_384, 53_248, 126, 128, rows=2048, rows_per_gpu=1),
]


def described(row: Candidate, assumed: Modelled) -> dict[str, Any]:
    """A predicted step as JSON."""
    parallel, training = row.config.parallel, row.config.training
    inside = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel
    tokens = training.global_batch_size * training.sequence_length
    flops = model_flops_per_token(row.config.model, training.sequence_length)
    parts = shares(row, assumed)
    return {
        "gpus": row.world,
        "tokens": tokens,
        "layout": {
            "tp": parallel.tensor_parallel, "pp": parallel.pipeline_parallel, "dp": row.world // inside,
            "schedule": row.name, "stages_a_rank": row.chunks, "micro_batch": training.micro_batch_size,
            "micro_batches": training.global_batch_size * inside // (training.micro_batch_size * row.world),
            "recompute": training.recompute,
        },
        "seconds": row.seconds,
        "tokens_per_second_per_gpu": tokens / row.seconds / row.world,
        "tflops_per_gpu": tokens * flops / row.seconds / row.world / 1e12,
        "mfu": tokens * flops / row.seconds / row.world / assumed.device.flops,
        "gib": row.peak / GIB,
        "parts": {"products and scores": 1 - sum(parts.values()), **parts},
    }  # fmt: skip


def point(model: Llama, kind: str, world: int, assumed: Modelled) -> dict[str, Any] | None:
    """The fastest layout of a model on so many GPUs, by the planner; None if none fits."""
    rows = model.rows if kind == "strong" else model.rows_per_gpu * world
    best = rank_layouts(model.config(rows), world, assumed, layout_problems).best
    if not best:
        return None
    found = described(best[0], assumed)
    print(line(model.name, kind, found), flush=True)
    return found


# arXiv 2407.21783, table 4: name, world, layout, rows, length, TFLOP/s per GPU.
PUBLISHED = [
    ("8,192 GPUs, DP64", 8192, {}, 2048, 8192, 430.0),
    ("16,384 GPUs, DP128", 16_384, {}, 2048, 8192, 400.0),
    ("16,384 GPUs, CP16 DP8", 16_384, {"context_parallel": 16}, 128, 131_072, 380.0),
]


def published(assumed: Modelled) -> list[dict[str, Any]]:
    """Rows of the paper beside predictions of the same layouts, TP8 PP16. It does not say how many stages a rank has: 1 and 4."""
    results = []
    for name, world, parallel, rows, length, reached in PUBLISHED:
        for schedule, loops in (("1f1b", 1), ("interleaved", 4)):
            layout = {"tensor_parallel": 8, "pipeline_parallel": 16, "pipeline_schedule": schedule, "virtual_stages": loops}
            config = MODELS[-1].config(rows, length, **layout, **parallel)
            row = candidate(config, world, schedule, loops, assumed, brief=True)
            tflops = rows * length * model_flops_per_token(config.model, length) / row.seconds / world / 1e12
            results.append(
                {"name": name, "gpus": world, "schedule": schedule, "stages_a_rank": loops, "length": length,
                 "published_tflops": reached,
                 "predicted_tflops": tflops, "error": tflops / reached - 1, "seconds": row.seconds}
            )  # fmt: skip
    return results


def line(model: str, kind: str, row: dict[str, Any]) -> str:
    """A point of a curve for people."""
    it = row["layout"]
    layout = f"TP{it['tp']} PP{it['pp']} DP{it['dp']} {it['schedule']} x{it['stages_a_rank']} mb {it['micro_batch']}"
    parts = ", ".join(f"{name} {share:.0%}" for name, share in row["parts"].items() if share >= 0.005)
    return (
        f"{model:>5} {kind:6} {row['gpus']:6,} GPUs {row['tokens'] / 2**20:7.2f} Mi tokens  {row['seconds']:8.3f} s  "
        f"{row['tokens_per_second_per_gpu']:8,.0f} tokens/s/GPU  MFU {row['mfu']:5.1%}  {layout:40} {parts}"
    )


def scaling(models: Sequence[Llama], worlds: Sequence[int], assumed: Modelled, processes: int) -> list[dict[str, Any]]:
    """Both curves of each model, the longest work first."""
    work = [
        (model, kind, world, assumed) for model in reversed(models) for world in reversed(worlds) for kind in ("weak", "strong")
    ]
    with multiprocessing.Pool(processes) as pool:
        found = dict(zip((one[:3] for one in work), pool.starmap(point, work, chunksize=1), strict=True))
    curves = []
    for model in models:
        of_kind = {kind: [found[model, kind, world] for world in worlds] for kind in ("strong", "weak")}
        curves.append({"model": asdict(model)} | {kind: [row for row in rows if row] for kind, rows in of_kind.items()})
    return curves


def main() -> int:
    """Predict, print, draw, write the JSON."""
    options = parser(__doc__)
    options.add_argument("--figure", type=Path, help="also draw: FILE.png, .svg or .pdf")
    options.add_argument("--smoke", action="store_true", help="8B on three small numbers of GPUs only")
    options.add_argument("--processes", type=int, default=2)
    args = options.parse_args()
    assumed = Modelled(DEVICES["h100"])
    conditions = machine()
    assumptions = {
        "device": asdict(assumed.device), "shares": asdict(assumed.shares), "sources": "megatron_llm/planning/hardware.py",
        "sequence_length": LENGTH, "searched": "all that `plan` tries",
        "precision": "bfloat16, masters and main gradients float32, AdamW, ZeRO stage 1",
        "left_out": LEFT_OUT,
    }  # fmt: skip
    for name, value in assumptions.items():
        print(f"{name}: {value}")
    models, worlds = ([replace(MODELS[0], rows=64)], [8, 16, 32]) if args.smoke else (MODELS, WORLDS)
    curves = scaling(models, worlds, assumed, args.processes)
    checks = published(assumed)
    for check in checks:
        print(
            f"published {check['name']}: {check['published_tflops']:.0f} TFLOP/s a GPU, predicted with {check['schedule']} "
            f"x{check['stages_a_rank']} {check['predicted_tflops']:.0f} ({check['error']:+.1%})"
        )
    judged = [check for check in checks if check["length"] == LENGTH and check["schedule"] == "interleaved"]
    if args.figure:
        from scale_figure import draw

        draw(args.figure, curves, judged)
    return finish(
        args.output,
        f"predicted, not measured: the published 405B steps of 8,192-token rows within {TOLERANCE:.0%}",
        all(abs(check["error"]) <= TOLERANCE for check in judged),
        conditions,
        assumptions=assumptions,
        published=checks,
        curves=curves,
    )


if __name__ == "__main__":
    sys.exit(main())
