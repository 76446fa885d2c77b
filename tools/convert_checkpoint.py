"""`megatron-llm import` and `export` as a script for a checkout: Hugging Face <-> native <-> Megatron, without installing.

python tools/convert_checkpoint.py import hf/llama checkpoints/llama
python tools/convert_checkpoint.py export --to megatron checkpoints/llama megatron/llama
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_llm.cli.main import main  # noqa: E402

if __name__ == "__main__":
    if sys.argv[1:2] not in (["import"], ["export"]):
        sys.exit(f"usage: {Path(sys.argv[0]).name} import|export ...; each says more with --help")
    sys.exit(main(sys.argv[1:]))
