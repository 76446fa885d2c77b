"""The loss curves of the stages as one picture. Called by `run.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `run_dir/metrics.jsonl` by step; where a resumed run repeated a step, the later line counts."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    by_step: dict[int, dict[str, Any]] = {}
    for line in map(json.loads, lines):
        by_step[line["step"]] = {**by_step.get(line["step"], {}), **line}
    return [by_step[step] for step in sorted(by_step)]


def plot_losses(runs: dict[str, Path], picture: Path) -> None:
    """Draw training and validation loss over the steps, one panel for each (title, run folder)."""
    figure, panels = plt.subplots(1, len(runs), figsize=(4.5 * len(runs), 3.6), squeeze=False)
    for panel, (title, run_dir) in zip(panels[0], runs.items(), strict=True):
        metrics = read_metrics(run_dir)
        train = [(line["step"], line["loss"]) for line in metrics if line.get("loss") is not None]
        valid = [(line["step"], line["valid_loss"]) for line in metrics if line.get("valid_loss") is not None]
        panel.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.6, linewidth=1, label="train")
        panel.plot(*zip(*valid, strict=True), color="tab:orange", marker="o", markersize=4, label="valid")
        panel.set(title=title, xlabel="step", ylabel="loss (nats a token)")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
