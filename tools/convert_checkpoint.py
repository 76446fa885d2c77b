"""`megatron-llm export` as a script for a checkout: python tools/convert_checkpoint.py CHECKPOINT_DIR HF_DIR [--dtype bf16]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_llm.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
