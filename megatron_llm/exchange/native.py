"""Native checkpoints that no run has written: weights only, at step 0, and the one question that all readers have.

An imported checkpoint's config is `{"model": ...}` alone: there is no run to describe. `model_config` reads it and a run's
alike. `imports.py` writes here; `cli/export.py` and `cli/generate.py` ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from megatron_llm.checkpoint import Checkpoint, TensorToSave, save_checkpoint
from megatron_llm.config import ModelConfig
from megatron_llm.hf.families import find_family
from megatron_llm.hf.family import Family, TensorName
from megatron_llm.hf.whole import whole_folder
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part, TensorSource

_MANIFEST = "manifest.json"
_COMPUTE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The architecture in a checkpoint's config; a model that never said its context has that of the run's rows.

    Raises ValueError (pydantic's) if the config does not describe a model.
    """
    model = ModelConfig.model_validate(checkpoint.config["model"])
    if not model.max_position_embeddings and "training" in checkpoint.config:
        model = model.model_copy(update={"max_position_embeddings": checkpoint.config["training"]["sequence_length"]})
    return model


def stored_dtype(checkpoint: Checkpoint) -> str:
    """safetensors' name of the dtype to export in when no folder says one: that of the run's arithmetic, or of what is stored."""
    compute = checkpoint.config.get("precision", {}).get("compute")
    if compute is None:
        return checkpoint.tensors("weights")["embedding.weight"].dtype
    return _COMPUTE.get(compute, "F32")


def write_checkpoint(
    source: TensorSource,
    model: ModelConfig,
    assets: Mapping[str, bytes],
    output: str | Path,
    *,
    family: Family | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write the folder `output` as a native checkpoint of `source`'s weights, in their dtypes. It appears whole or not at all.

    Args:
        assets: as `collect_assets` made them.
        family: which tensors the model has; None: Llama.
        overwrite: replace a checkpoint that is there. Anything else in the way is refused all the same.
        progress: show a bar.

    Raises ValueError if `output` is in the way, the source lacks a tensor, or the checkpoint could not be written.
    """
    names = list((family or find_family("LlamaForCausalLM")).tensor_names(model))
    config = {"model": model.model_copy(update={"hf": None}).model_dump(mode="json")}
    state = {"step": 0, "updates": 0, "rows": 0, "tokens": 0}
    with whole_folder(output, overwrite, "checkpoint", _foreign) as folder:
        tensors = _read_all(source, tqdm(names, desc=f"Reading for {Path(output).name}", unit=" tensors", disable=not progress))
        try:
            save_checkpoint(folder, tensors, run_state=state, config=config, assets=dict(assets), world=Axis("world"))
        except ValueError as error:
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None  # of the source: the folder that was to be written has nothing to do with it
            raise


def _foreign(folder: Path) -> str | None:
    return None if (folder / _MANIFEST).is_file() else f"has no {_MANIFEST}"


def _read_all(source: TensorSource, names: Iterable[TensorName]) -> Iterator[TensorToSave]:
    """Every tensor of the model, read when its turn comes."""
    for tensor in names:
        box = Box.full(tensor.shape)
        values = source.read(Part(tensor.logical, tensor.shape, ()), box)
        yield TensorToSave("weights", tensor.logical, tensor.shape, box, values)
