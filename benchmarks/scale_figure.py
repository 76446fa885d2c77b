"""The picture of `scale_simulation.py`: efficiency over GPUs, and what the time of strong scaling goes to. Called by it.

By itself it draws the stored results again:

    python benchmarks/scale_figure.py [docs/scale.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {"8B": "#0072B2", "70B": "#D55E00", "405B": "#009E73"}  # those of Okabe and Ito (2008)
# The optimizer is below 0.3 % of every step and is not drawn.
PARTS = {
    "products and scores": ("#BFD7EA", "matrix products, attention scores"),
    "memory": ("#56B4E9", "norms, rotation, operands: device memory"),
    "tensor parallel": ("#F0E442", "tensor parallelism, exposed"),
    "data parallel": ("#E69F00", "data parallelism, exposed"),
    "idle": ("#4D4D4D", "pipeline bubble"),
}
SCHEDULES = {"1f1b": "1F1B", "interleaved": "interleaved", "zb_h1": "ZB-H1", "zb_v": "ZB-V", "v_half": "V-half"}
TITLE = "Llama-3.1 on 8 to 16,384 H100: predicted by the planner's model, not measured"


def draw(path: Path, curves: list[dict[str, Any]], published: list[dict[str, Any]]) -> None:
    """Write the picture, in the format of the suffix. curves, published: as in the stored results."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 15.2), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.add_gridspec(2, 1, height_ratios=(1, 2.05), left=0.055, right=0.985, top=0.922, bottom=0.108, hspace=0.22)
    figure.text(0.055, 0.975, TITLE, fontsize=18, fontweight="bold", va="center")
    figure.text(
        0.055, 0.953, "rows of 8,192 tokens, bfloat16, the fastest layout that fits at each number of GPUs; stragglers, "
        "failures, checkpoints, network contention are not in the model", fontsize=11.5, color="0.3", va="center",
    )  # fmt: skip
    above = rows[0].subgridspec(1, 2, wspace=0.09)
    worlds = sorted({row["gpus"] for model in curves for row in model["strong"] + model["weak"]})
    titles = {
        "strong": "Strong scaling: the tokens of a step stay the same",
        "weak": "Weak scaling: the tokens of a step grow with the GPUs",
    }
    for number, kind in enumerate(titles):
        _efficiency(figure.add_subplot(above[number]), titles[kind], kind, curves, worlds, published)
    below = rows[1].subgridspec(len(curves), 1, hspace=0.98)
    for number, model in enumerate(curves):
        _parts(figure.add_subplot(below[number]), model, worlds)
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for colour, label in PARTS.values()]
    figure.legend(
        handles=handles, loc="lower center", ncols=len(PARTS), frameon=False, fontsize=10.5, bbox_to_anchor=(0.52, 0.018)
    )
    note = (
        "below the bars: GPUs; split; schedule with its stages a rank; micro-batches of a replica x rows in each; recomputation"
    )
    figure.text(0.52, 0.009, note, ha="center", fontsize=10.5, color="0.3")
    figure.savefig(str(path))


def _efficiency(
    axes: Any, title: str, kind: str, curves: list[dict[str, Any]], worlds: list[int], published: list[dict[str, Any]]
) -> None:
    """MFU over GPUs, a line a model; where others published, what they measured."""
    for model in curves:
        name = model["model"]["name"]
        points = model[kind]
        x, y = [row["gpus"] for row in points], [100 * row["mfu"] for row in points]
        first, last = points[0], points[-1]
        batch = (
            f"{first['tokens'] / 2**20:g} Mi tokens" if kind == "strong" else f"{last['tokens'] // last['gpus']:,} tokens a GPU"
        )
        axes.plot(x, y, "-o", color=COLOURS[name], linewidth=2.2, markersize=5, label=f"{name}, {batch}")
    if kind == "strong" and published:
        x = [row["gpus"] for row in published]
        measured, predicted = ([100 * row[f"{which}_tflops"] / 989 for row in published] for which in ("published", "predicted"))
        axes.plot(x, measured, "D", color="black", markersize=8, label="405B, measured by Meta (TP8 PP16)", zorder=5)
        axes.plot(
            x, predicted, "D", markerfacecolor="none", markeredgecolor="black", markersize=8,
            label="the same layouts, predicted", zorder=5,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(worlds, [f"{world:,}" for world in worlds], fontsize=9.5)
    axes.set(ylim=(0, 62), xlabel="GPUs", ylabel="MFU, %" if kind == "strong" else "")
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold")
    axes.grid(True, color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False, fontsize=10.5)


def _parts(axes: Any, model: dict[str, Any], worlds: list[int]) -> None:
    """Shares of a strong-scaling step, and the layout below each bar."""
    by_world = {row["gpus"]: row for row in model["strong"]}
    labels = []
    for x, world in enumerate(worlds):
        row = by_world.get(world)
        labels.append(f"{world:,}\n" + (_layout(row) if row else "does\nnot fit"))
        if row is None:
            continue
        bottom = 0.0
        for part, (colour, _) in PARTS.items():
            share = 100 * row["parts"].get(part, 0.0)
            axes.bar(x, share, 0.82, bottom=bottom, color=colour, edgecolor="white", linewidth=0.6)
            if share >= 9 and part != "products and scores":
                dark = part in ("idle",)
                axes.text(x, bottom + share / 2, f"{share:.0f}", ha="center", va="center", fontsize=9, color="w" if dark else "k")
            bottom += share
        axes.text(x, 101.5, f"{row['seconds']:.3g} s", ha="center", va="bottom", fontsize=9.5, color="0.25")
    tokens = model["strong"][0]["tokens"] / 2**20
    name = model["model"]["name"]
    axes.set_title(
        f"{name}: what a step of {tokens:g} Mi tokens goes to, %", loc="left", fontsize=12.5, fontweight="bold",
        color=COLOURS[name], pad=16,
    )  # fmt: skip
    axes.set_xticks(range(len(worlds)), labels, fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set(xlim=(-0.6, len(worlds) - 0.4), ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)


def _layout(row: dict[str, Any]) -> str:
    """The split; the schedule; micro-batches x rows of each, recomputation."""
    it = row["layout"]
    first = f"TP{it['tp']} PP{it['pp']} DP{it['dp']}"
    loops = f" x{it['stages_a_rank']}" if it["schedule"] == "interleaved" else ""
    schedule = SCHEDULES[it["schedule"]] + loops if it["pp"] > 1 else "no pipeline"
    recompute = {"none": "", "selective": "\nselective rec.", "full": "\nfull rec."}[it["recompute"]]
    return f"{first}\n{schedule}\n{it['micro_batches']} x {it['micro_batch']}{recompute}"


if __name__ == "__main__":
    stored = json.loads((Path(__file__).parent / "results" / "scale_simulation.json").read_text())
    shown = [row for row in stored["published"] if row["length"] == 8192 and row["schedule"] == "interleaved"]
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/scale.png"), stored["curves"], shown)
