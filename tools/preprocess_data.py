"""`megatron-llm preprocess` as a script, for a checkout that is not installed."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_llm.cli.preprocess import HELP, add_arguments, run  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=HELP)
    add_arguments(parser)
    try:
        sys.exit(run(parser.parse_args()))
    except ValueError as error:
        sys.exit(f"error: {error}")
