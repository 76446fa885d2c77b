"""`megatron-llm train`: pretraining, continued pretraining and fine-tuning, alone or under torchrun."""

from __future__ import annotations

import argparse

from megatron_llm.cli.settings import add_config

HELP = "train, or continue to train, as a configuration says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """YAML files and overrides."""
    add_config(parser)
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="go on although settings that decide the numbers (data, optimizer, schedule, ...) are not those of the checkpoint",
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, then train. Returns 0 when done, 75 (or 0, see `training/distributed.py`) when stopped."""
    from megatron_llm.training.distributed import launched_world_size
    from megatron_llm.training.loop import train
    from megatron_llm.training.resolve import resolve

    return train(resolve(args.config, args.overrides, launched_world_size()), args.allow_change)
