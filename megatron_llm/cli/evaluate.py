"""`megatron-llm evaluate`: scores on public tasks, by lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack

HELP = "score a checkpoint or a Hugging Face folder on public tasks, with lm-evaluation-harness"

PRESETS = ("open-llm-leaderboard",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on which tasks."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="DIR", help="a checkpoint, or a run folder (its newest checkpoint)")
    model.add_argument("--hf", metavar="DIR", help="a Hugging Face folder; code in it is never run")
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument(
        "--preset",
        choices=PRESETS,
        default=PRESETS[0],
        help="ARC (25 shots), HellaSwag (10), MMLU (5) and TruthfulQA (0), and their average (default)",
    )
    tasks.add_argument("--tasks", metavar="TASK:SHOTS,...", help="tasks or groups of the harness; without SHOTS as they say")
    parser.add_argument("--include-path", metavar="DIR", help="a folder of further tasks in YAML")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task, for a trial")
    parser.add_argument("--apply-chat-template", action="store_true", help="show questions as a user's messages")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions at a time (default: 8)")
    parser.add_argument("--export-to", metavar="DIR", help="keep the folder that a checkpoint is exported to")
    parser.add_argument("--output", metavar="FILE", help="write all metrics as JSON, too")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: that of the folder's weights"
    )


def run(args: argparse.Namespace) -> int:
    """Print a line for each task. Raises ValueError for unknown tasks, or a model that cannot be used."""
    from megatron_llm.hf.harness import PRESETS, evaluate_folder, open_tasks, parse_tasks, summary, table
    from megatron_llm.training.distributed import launched_world_size, pick_device

    if launched_world_size() > 1:
        raise ValueError("evaluate runs in one process; start it without torchrun")
    for option in ("limit", "batch_size"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if args.export_to is not None and args.checkpoint is None:
        raise ValueError("--export-to goes with --checkpoint; a Hugging Face folder is evaluated as it is")
    tasks = PRESETS[args.preset] if args.tasks is None else parse_tasks(args.tasks)
    manager = open_tasks(tasks, args.include_path)
    device = pick_device(args.device)
    with ExitStack() as stack:
        folder = args.hf
        if folder is None:
            folder = args.export_to or f"{stack.enter_context(tempfile.TemporaryDirectory())}/hf"
            _export(args.checkpoint, folder)
        results = evaluate_folder(
            folder,
            tasks,
            manager,
            limit=args.limit,
            chat_template=args.apply_chat_template,
            batch_size=args.batch_size,
            device=str(device),
            dtype=args.dtype,
        )
    average = args.tasks is None
    print(table(results, average))
    if args.output is not None:
        place = args.hf if args.hf is not None else args.checkpoint
        what = summary(results, average, model=place, limit=args.limit, chat_template=args.apply_chat_template)
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(json.dumps(what, indent=2) + "\n")
    return 0


def _export(place: str, folder: str) -> None:
    """Write the Hugging Face folder of a checkpoint."""
    from megatron_llm.checkpoint import find_checkpoint
    from megatron_llm.cli.export import assets_of
    from megatron_llm.hf import export_hf

    checkpoint = find_checkpoint(place)
    checkpoint.verify()
    export_hf(
        checkpoint.source("weights"), checkpoint.model, assets_of(checkpoint), folder, default_dtype=checkpoint.export_dtype
    )
