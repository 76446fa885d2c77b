"""A model with what text needs besides weights: its tokenizer, and the ids that end a text.

Called by `cli/generate.py`, `cli/chat.py`, `training/inference.py` and `training/samples.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.folders import find_checkpoint
from megatron_llm.config import ModelConfig
from megatron_llm.data.chat_tokenizer import reply_end_ids
from megatron_llm.data.tokenizer import load_pretrained
from megatron_llm.hf.assets import CONFIG, collect_assets, exported_files
from megatron_llm.hf.reader import HFFolder
from megatron_llm.parallel.shard import TensorSource


@dataclass(frozen=True)
class Place:
    """Where a model is: a Hugging Face folder, or a checkpoint (a run folder stands for its newest). One of them is set."""

    hf: str | None = None
    checkpoint: str | None = None

    def open(self, verify: bool = False) -> OpenModel:
        """Read what is small. verify: compare the checksums of a checkpoint, which reads all of it.

        Raises ValueError if it is none that this engine can run.
        """
        if self.hf is not None:
            folder = HFFolder(self.hf)
            model = ModelConfig(**folder.model_fields())
            weights: TensorSource = folder.source(model)
            assets = collect_assets(folder.path)
        else:
            assert self.checkpoint is not None
            checkpoint = find_checkpoint(self.checkpoint)
            if verify:
                checkpoint.verify()
            model, weights, assets = checkpoint.model, checkpoint.source("weights"), checkpoint.assets
        return OpenModel(model, weights, model_files(assets))


@dataclass(frozen=True)
class OpenModel:
    """Architecture, weights, and the files of a Hugging Face folder that come with them."""

    config: ModelConfig
    weights: TensorSource
    files: Mapping[str, bytes]

    def tokenizer(self, folder: str | None = None) -> Any:
        """The tokenizer in `folder`, or the one that travels with the model. Raises ValueError if there is none."""
        if folder is not None:
            return load_pretrained(folder)
        if not any(name.startswith(("tokenizer", "vocab")) or name.endswith(".model") for name in self.files):
            raise ValueError(
                "no tokenizer travels with this model; give one with --tokenizer DIR (training copies data.tokenizer)"
            )
        with tempfile.TemporaryDirectory() as temporary:
            for name, content in self.files.items():
                Path(temporary, name).write_bytes(content)
            return load_pretrained(temporary)


def model_files(assets: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a Hugging Face folder among what travels with a model, config.json included."""
    files = exported_files(assets)
    return files | {"config.json": assets[CONFIG]} if CONFIG in assets else files


def stop_ids(tokenizer: Any, files: Mapping[str, bytes]) -> frozenset[int]:
    """The ids that end a text, by the tokenizer, its chat template and the model's configs among `files`."""
    found = {tokenizer.eos_token_id, *reply_end_ids(tokenizer)}
    for name in ("config.json", "generation_config.json"):
        try:
            ids = json.loads(files.get(name, b"{}")).get("eos_token_id")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{name} that comes with the model is no JSON object: {error}") from error
        ids = ids if isinstance(ids, list) else [ids]
        if not all(one is None or type(one) is int for one in ids):
            raise ValueError(f"{name} that comes with the model: eos_token_id {ids!r} must be token ids")
        found.update(ids)
    return frozenset(found - {None})
