"""`megatron-llm import`: a Hugging Face folder or a Megatron checkpoint becomes a native checkpoint, weights only.

`cli/import_.py` calls this. One process, or several tasks that write the checkpoint together; no process group, no GPU.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.data.tokenizer import vocabulary_size
from megatron_llm.exchange.arguments import model_from_args, refuse_other_than_llama, true_vocab_size
from megatron_llm.exchange.native import write_checkpoint
from megatron_llm.exchange.source import EMBEDDING, MegatronSource
from megatron_llm.exchange.torch_dist import COMMON, TorchDistFolder
from megatron_llm.hf import HFFolder, collect_assets
from megatron_llm.hf.assets import CONFIG, TENSOR_DTYPES
from megatron_llm.hf.together import Share
from megatron_llm.models.vocabulary import resized
from megatron_llm.ops.tensor_file import TORCH_NAMES

_NOT_COMPARED = ("hf", "max_position_embeddings", "initializer_range")  # what config.json may say otherwise


def import_hf(
    folder: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    resize_vocab: int | str | None = None,
    share: Share = Share(),
    overwrite: bool = False,
    progress: bool = False,
) -> list[str]:
    """Write the checkpoint `output` from a Hugging Face folder; its configs and tokenizer travel along.

    Args:
        tokenizer: a folder whose tokenizer files replace those of `folder`.
        share: which task of how many this is, if several write the checkpoint together.
        resize_vocab: tokens that the model is to have, or "tokenizer": as many as the tokenizer that travels along.

    Returns sentences that say what was done; none while other tasks are at work. Raises ValueError if the folder is not one
    that this engine can read, or has more tokens than it is to have.
    """
    hf = HFFolder(folder)
    stored = ModelConfig(**hf.model_fields())
    size = stored.vocab_size if resize_vocab is None else resize_vocab
    if isinstance(size, str):
        size = max(stored.vocab_size, vocabulary_size(tokenizer or hf.path))  # rows beyond the tokenizer are padding of theirs
    source = resized(hf.source(stored), stored.vocab_size, size, str(hf.path))
    model, assets = stored.model_copy(update={"vocab_size": size}), collect_assets(hf.path, tokenizer)
    origin = str(hf.path.absolute())
    whole = write_checkpoint(source, model, assets, output, share=share, origin=origin, overwrite=overwrite, progress=progress)
    if not whole:
        return []
    said = [f"{hf.path} -> {output}: {hf.family.architecture}, {model.num_hidden_layers} layers", *hf.notes()]
    if size != stored.vocab_size:
        said.append(f"vocabulary: {size} tokens, {size - stored.vocab_size} of them new: the mean of the others")
    return said


def import_megatron(
    path: str | Path,
    output: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    share: Share = Share(),
    overwrite: bool = False,
    progress: bool = False,
) -> list[str]:
    """Write the checkpoint `output` from a megatron-core `torch_dist` checkpoint. The optimizer's state is left behind.

    Args:
        path: the folder of an iteration, or the one above it: its newest iteration.
        config: a Hugging Face folder whose config.json says what the model is and travels along; needed where the
            checkpoint does not hold the run's arguments. Where both are there, they must agree.
        tokenizer: a folder whose tokenizer files travel along.
        share: which task of how many this is, if several write the checkpoint together.
        vocab_size: rows of the embedding that belong to tokens; the others are padding. None: as the arguments, config or
            the tokenizer say.

    Returns sentences that say what was done; none while other tasks are at work. Raises ValueError naming the file and the way
    out if anything is missing, damaged, unknown or not a Llama.
    """
    folder = TorchDistFolder(path)
    hf = _config_folder(config)
    args = _args(folder, optional=hf is not None)
    size, origin = _vocab_size(folder, vocab_size, hf, args, tokenizer)
    model = _model(folder, hf, args, size)
    source = MegatronSource(folder, model)
    assets = _assets(hf, tokenizer, folder.tensors[EMBEDDING].dtype if not source.masters else "F32")
    place = str(folder.path.absolute())
    whole = write_checkpoint(source, model, assets, output, share=share, origin=place, overwrite=overwrite, progress=progress)
    if not whole:
        return []
    said = [f"{folder.path} -> {output}: {model.num_hidden_layers} layers, weights only"]
    said.append(f"vocabulary: {size} tokens ({origin}); {source.padding} rows of padding left out")
    if source.masters:
        said.append("values: the optimizer's float32 masters, not the rounded weights")
    return said


def _config_folder(config: str | Path | None) -> HFFolder | None:
    if config is None:
        return None
    hf = HFFolder(config)
    refuse_other_than_llama(ModelConfig(**hf.model_fields()), str(hf.path))
    return hf


def _args(folder: TorchDistFolder, optional: bool) -> Namespace | None:
    """The arguments of the run that saved the folder; None where they are not there or not readable, and not needed."""
    try:
        args = folder.common().get("args")
    except ValueError:
        if optional:
            return None
        raise
    if isinstance(args, Namespace):
        return args
    if optional:
        return None
    file = folder.path / COMMON
    what = "holds no arguments of a run" if file.is_file() else "is missing"
    raise ValueError(f"{file} {what}, so the architecture is unknown; give it as a Hugging Face folder with --config HF_DIR")


def _vocab_size(
    folder: TorchDistFolder, given: int | None, hf: HFFolder | None, args: Namespace | None, tokenizer: str | Path | None
) -> tuple[int, str]:
    """The size of the vocabulary without padding, and who says so."""
    if EMBEDDING not in folder.tensors:
        raise ValueError(f"{folder.path} has no {EMBEDDING}, so it is no checkpoint of a GPT model")
    rows = folder.tensors[EMBEDDING].shape[0]
    size, origin = given, "--vocab-size"
    if size is None and hf is not None:
        size, origin = int(hf.model_fields()["vocab_size"]), str(hf.path / "config.json")
    if size is None and args is not None:
        size, origin = true_vocab_size(args), f"args in {COMMON}"
    if size is None and tokenizer is not None:
        size, origin = vocabulary_size(tokenizer), str(tokenizer)
    if size is None:
        raise ValueError(
            f"{folder.path}: the embedding has {rows} rows, of which some may be padding, and {COMMON} does not say how many are "
            f"tokens; give the number with --vocab-size N (without padding: {rows}), or a tokenizer with --tokenizer DIR"
        )
    if not 0 < size <= rows:
        raise ValueError(
            f"a vocabulary of {size} tokens ({origin}), but {EMBEDDING} in {folder.path} has {rows} rows; give --vocab-size"
        )
    return size, origin


def _model(folder: TorchDistFolder, hf: HFFolder | None, args: Namespace | None, vocab_size: int) -> ModelConfig:
    """The architecture by config.json, by the run's arguments, or by both in agreement."""
    from_args = model_from_args(args, vocab_size, str(folder.path / COMMON)) if args is not None else None
    if hf is None:
        assert from_args is not None, "_args raises where there is neither"
        return from_args
    model = ModelConfig(**{**hf.model_fields(), "vocab_size": vocab_size})
    if from_args is not None:
        ours, theirs = model.model_dump(exclude=set(_NOT_COMPARED)), from_args.model_dump(exclude=set(_NOT_COMPARED))
        different = [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
        if different:
            raise ValueError(
                f"{hf.path / 'config.json'} and the arguments in {folder.path / COMMON} disagree: {'; '.join(different)}. "
                "Leave out --config, or correct its config.json"
            )
    return model


def _assets(hf: HFFolder | None, tokenizer: str | Path | None, dtype: str) -> dict[str, bytes]:
    """What travels along. The weights are not those of the config's folder, so neither are their dtypes."""
    assets = collect_assets(hf.path if hf is not None else None, tokenizer)
    assets.pop(TENSOR_DTYPES, None)
    if CONFIG in assets and dtype in TORCH_NAMES:
        config: dict[str, Any] = json.loads(assets[CONFIG])
        spellings = [key for key in ("dtype", "torch_dtype") if config.get(key) not in (None, TORCH_NAMES[dtype])]
        if spellings:
            config |= dict.fromkeys(spellings, TORCH_NAMES[dtype])
            assets[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return assets
