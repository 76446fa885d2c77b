"""What a config leaves to the model and the adapters that it starts from: the sections `model` and `peft`, filled in.

Called by `training/resolve.py` before a config is parsed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.folders import find_checkpoint, latest_checkpoint
from megatron_llm.checkpoint.load import Checkpoint
from megatron_llm.config import ConfigError, LoggingConfig, ModelConfig, with_present_names
from megatron_llm.hf.export import family_of
from megatron_llm.hf.family import Family
from megatron_llm.hf.peft import PeftFolder
from megatron_llm.hf.reader import HFFolder
from megatron_llm.models.vocabulary import refuse_to_shrink

_ZERO_MEANS_DEFAULT = ("num_key_value_heads", "head_dim", "rotary_dim", "max_position_embeddings")


def complete_model(raw: dict[str, Any]) -> HFFolder | Checkpoint | None:
    """Fill `raw["model"]` in place from what `model.hf` or `model.checkpoint` names. A field given as well must agree."""
    section = raw.get("model")
    if not isinstance(section, dict):
        return None
    section = raw["model"] = with_present_names(section)
    key, *more = [name for name in ("hf", "checkpoint") if section.get(name) is not None] or [""]
    if not key:
        if section.get("resize_vocab"):
            raise ConfigError(["model.resize_vocab: goes with model.hf or model.checkpoint; give a new model its vocab_size"])
        return None
    place = section[key]
    if more:
        raise ConfigError([f"model.hf: {place} and model.checkpoint: {section['checkpoint']} both give weights; remove one"])
    if not isinstance(place, str):
        what = "Hugging Face folder" if key == "hf" else "checkpoint or run folder"
        raise ConfigError([f"model.{key}: must be the path of a {what}, got {place!r}"])
    source: HFFolder | Checkpoint | None
    try:
        source = HFFolder(place) if key == "hf" else find_checkpoint(place)
        model = _resized_model(model_of_source(source), section, place)
        if isinstance(source, Checkpoint) and section.get("checkpoint_ema") and "ema" not in source.kinds:
            raise ValueError(f"{source.folder} has no average of the weights; remove model.checkpoint_ema")
    except ValueError as error:
        own = _own_checkpoint(raw)
        if own is None:
            raise ConfigError([f"model.{key}: {error}"]) from error
        source, model = None, own.model  # a run that has its own weights can do without those that it began with
    if isinstance(source, Checkpoint):
        section["checkpoint"] = str(source.folder)  # which of a run's, is said in the checkpoints of this one
    fields = model.model_dump(exclude={"hf", "checkpoint", "checkpoint_ema", "resize_vocab"})
    problems = [
        f"model.{name}: {section[name]!r} contradicts {fields[name]!r} of {place}; remove it here"
        for name in fields
        if name in section and section[name] != fields[name] and (section[name] or name not in _ZERO_MEANS_DEFAULT)
    ]
    if problems:
        raise ConfigError(problems)
    section.update(fields)
    return source


def complete_peft(raw: dict[str, Any], source: HFFolder | Checkpoint | None) -> None:
    """Fill `raw["peft"]` in place from the adapter folder that `peft.init` names. A field given as well must agree."""
    section = raw.get("peft")
    if not isinstance(section, dict) or section.get("init") is None:
        return
    place, targets = section["init"], section.get("targets")
    if not isinstance(place, str):
        raise ConfigError([f"peft.init: must be the path of a folder in PEFT's format, got {place!r}"])
    own = _own_checkpoint(raw)
    try:
        if source is None and own is None:
            raise ValueError("an adapter belongs to a model; name it with model.hf or model.checkpoint")
        given = targets if isinstance(targets, list) and targets and all(isinstance(one, str) for one in targets) else None
        if source is None:
            raise ValueError("the model that the adapter belongs to is not there")
        fields = PeftFolder(place).settings(family_of_source(source), model_of_source(source), given)
    except ValueError as error:
        if own is None or not own.config.get("peft"):
            raise ConfigError([f"peft.init: {error}"]) from error
        fields = own.config["peft"]  # a run that has its own adapters can do without those that it began with
    problems = [
        f"peft.{name}: {section[name]!r} contradicts {value!r} of {place}; remove it here"
        for name, value in fields.items()
        if name not in ("init", "targets") and name in section and section[name] != value
    ]
    if problems:
        raise ConfigError(problems)
    raw["peft"] = {**fields, **section}


def family_of_source(source: HFFolder | Checkpoint) -> Family:
    return source.family if isinstance(source, HFFolder) else family_of(source.assets, source.model)


def model_of_source(source: HFFolder | Checkpoint) -> ModelConfig:
    """The architecture of a source. Raises ValueError if it is none that this engine can run."""
    return source.model if isinstance(source, Checkpoint) else ModelConfig(**source.model_fields())


def _resized_model(model: ModelConfig, section: dict[str, Any], place: str) -> ModelConfig:
    """A source's architecture with the vocabulary that the config asks for. Raises ValueError if that is smaller."""
    size = section.get("resize_vocab")
    if not isinstance(size, int) or not size:
        return model
    refuse_to_shrink(model.vocab_size, size, place)
    return model.model_copy(update={"vocab_size": size})


def _own_checkpoint(raw: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint of the run itself, if it is to go on and has one; as far as a raw config says."""
    sections = (raw.get("checkpoint") or {}, raw.get("logging") or {})
    if not all(isinstance(section, dict) for section in sections) or sections[0].get("resume") == "never":
        return None
    try:
        return latest_checkpoint(
            sections[0].get("path") or Path(sections[1].get("run_dir", LoggingConfig().run_dir)) / "checkpoints"
        )
    except (ValueError, TypeError):
        return None
