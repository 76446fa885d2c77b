"""The other side of `verify`: what transformers computes with a folder, and where its classes are not to be believed.

Called by `training/verify.py`.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_llm.config import ModelConfig
from megatron_llm.hf.reader import HFFolder
from megatron_llm.training.verify_text import Documents

_MPT_ALIBI = 8.0  # the alibi_bias_max that MptModel has, whatever config.json says


@dataclass(frozen=True)
class Outputs:
    """What a model says about the documents: logits [T, V] in float32 on the CPU, and the mean loss of a token that has one."""

    logits_TV: Tensor
    loss: float


def class_of(folder: HFFolder) -> Any:
    """transformers' class of a folder. Raises ValueError if it has none."""
    import transformers

    found = getattr(transformers, folder.family.architecture, None)
    if found is None:
        raise ValueError(
            f"{folder.path}: transformers {transformers.__version__} has no {folder.family.architecture}, so there is nothing to "
            "compare with"
        )
    return found


def attention_of(folder: HFFolder) -> str:
    """The implementation that computes what the model means: the plain one, but Falcon's of transformers 5 adds ALiBi twice."""
    return "sdpa" if folder.family.model_type == "falcon" else "eager"


def corrections(model: ModelConfig) -> Iterator[str]:
    """What is set right in transformers' model, a sentence each."""
    if model.position_embedding == "alibi" and model.alibi_bias_max != _MPT_ALIBI:
        yield f"transformers takes no notice of alibi_bias_max {model.alibi_bias_max:g}; it has been told"


def _correct(model: Any, ours: ModelConfig) -> None:
    """Do so. Only MPT has the field: its `forward` leaves the default of its own function in place."""
    if list(corrections(ours)):
        body = model.transformer
        body.build_mpt_alibi_tensor = functools.partial(body.build_mpt_alibi_tensor, alibi_bias_max=ours.alibi_bias_max)


@torch.no_grad()
def reference(folder: HFFolder, ours: ModelConfig, documents: Documents, dtype: torch.dtype, device: torch.device) -> Outputs:
    """What transformers computes, every document alone. The model is gone when this returns.

    ours: the same model as this engine has it. Raises ValueError if transformers cannot load the folder, does not find all of its
    tensors, or computes no finite numbers.
    """
    model = _load(folder, dtype).to(device).eval()
    _correct(model, ours)
    logits_TV = torch.cat([_logits(folder, model, document, device) for document in documents.ids])
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not bool(logits_TV.isfinite().all()):
        raise ValueError(f"{folder.path}: transformers itself computes logits that are not finite")
    batch = documents.batch()
    losses_T = cross_entropy(logits_TV, batch.labels_T, reduction="none").double()
    return Outputs(logits_TV, float((losses_T * batch.weights_T).sum() / batch.weights_T.sum()))


def _logits(folder: HFFolder, model: Any, document: tuple[int, ...], device: torch.device) -> Tensor:
    """Those of one document."""
    try:
        outputs = model(input_ids=torch.tensor([document], device=device), use_cache=False)
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
        tokens = len(document)
        raise ValueError(f"{folder.path}: transformers fails with {tokens} tokens: {type(error).__name__}: {error}") from error
    return outputs.logits[0].float().cpu()


def _load(folder: HFFolder, dtype: torch.dtype) -> Any:
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model, found = class_of(folder).from_pretrained(
            folder.path, dtype=dtype, attn_implementation=attention_of(folder), local_files_only=True, trust_remote_code=False,
            weights_only=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # its checks of config.json have exceptions of several libraries
        raise ValueError(f"{folder.path}: transformers cannot load it: {type(error).__name__}: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder.path}: transformers does not find {', '.join(missing[:5])} ({len(missing)} tensors) in it")
    return model
