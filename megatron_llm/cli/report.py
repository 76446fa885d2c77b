"""`megatron-llm report`: one page of what became of a run, or of several beside each other."""

from __future__ import annotations

import argparse

HELP = "make one self-contained HTML page of a run, or of several runs compared"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run folders and the page."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder (logging.run_dir), or the metrics.jsonl in it")
    parser.add_argument("--output", default="report.html", metavar="FILE.html", help="the page (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Read the runs and write the page. Raises ValueError for a path that is no run."""
    from pathlib import Path

    from tqdm import tqdm

    from megatron_llm.training.report.page import write_report
    from megatron_llm.training.report.read import find_runs

    output = Path(args.output)
    files = [folder / "metrics.jsonl" for folder in find_runs(args.runs)]
    total = sum(file.stat().st_size for file in files if file.exists())
    with tqdm(total=total, desc="reading metrics", unit="B", unit_scale=True, delay=2) as bar:
        runs = write_report(args.runs, output, bar.update)
    for found in runs:
        for note in found.notes:
            print(f"{found.folder}: {note}")
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return 0
