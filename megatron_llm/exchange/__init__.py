"""Other systems' checkpoints: megatron-core's `torch_dist` folders in and out, and the writer that every import ends in.

`cli/import_.py` and `cli/export.py` call it. Nothing here imports megatron or executes what a file says.
"""

from megatron_llm.exchange.export import export_megatron
from megatron_llm.exchange.imports import import_hf, import_megatron
from megatron_llm.exchange.native import write_checkpoint

__all__ = ["export_megatron", "import_hf", "import_megatron", "write_checkpoint"]
