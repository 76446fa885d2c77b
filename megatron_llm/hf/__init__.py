"""Hugging Face folders in and out: `HFFolder` reads one, `export_hf` writes one, `families/` says what is what.

Importing the package, checking a folder and mapping its config need no torch.
"""

from megatron_llm.hf.assets import collect_assets
from megatron_llm.hf.export import export_hf
from megatron_llm.hf.peft import PeftFolder, export_adapter
from megatron_llm.hf.reader import HFFolder, HFSource

__all__ = ["HFFolder", "HFSource", "PeftFolder", "collect_assets", "export_adapter", "export_hf"]
