"""`megatron-llm config`: look at a configuration without running it."""

from __future__ import annotations

import argparse
import json

import yaml

from megatron_llm.cli.settings import add_config

HELP = "show a configuration with everything filled in, or its JSON schema"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two sub-commands: show and schema."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print the checked configuration with all defaults as YAML")
    add_config(show)
    actions.add_parser("schema", help="print the JSON schema of a configuration")


def run(args: argparse.Namespace) -> int:
    """Print one of the two. Raises ConfigError with every problem of the configuration or of the folder that `model.hf` names."""
    if args.action == "schema":
        from megatron_llm.config import Config

        print(json.dumps(Config.model_json_schema(), indent=2))
    else:
        from megatron_llm.training.resolve import load_config

        config = load_config(args.config, args.overrides).config
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
    return 0
