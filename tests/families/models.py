"""What the tests of families against transformers share: a batch of packed documents, both sides' numbers, ranks' gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megatron_llm.config import ModelConfig
from megatron_llm.hf.reader import HFFolder
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import Box, pieces
from megatron_llm.training.build import build_engine, build_model
from megatron_llm.training.step import _run_microbatches
from tests.runs import config_of

DOCUMENTS = (5, 1, 21, 9)  # on both sides of windows and of pretrained contexts


def packed_batch(vocab_size: int) -> Batch:
    """Documents back to back; some tokens without loss."""
    generator = torch.Generator().manual_seed(1)
    total = sum(DOCUMENTS)
    tokens = torch.randint(0, vocab_size, (total + 1,), generator=generator)
    boundaries = torch.tensor((0, *DOCUMENTS)).cumsum(0).tolist()
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])
    weights = torch.rand(total, generator=generator).round()
    return Batch(tokens[:-1], tokens[1:], weights, positions, tuple(boundaries))


def reference(hf: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits [T, V], weighted loss sum) of transformers with every document alone, which is what packing must equal."""
    logits = torch.cat([hf(tokens[None], use_cache=False).logits[0] for tokens in batch.tokens_T.split(DOCUMENTS)])
    losses = torch.nn.functional.cross_entropy(logits, batch.labels_T, reduction="none")
    return logits, (losses * batch.weights_T).sum()


def logical_gradients(hf: Any, folder: HFFolder, model: ModelConfig) -> dict[str, Tensor]:
    """transformers' gradients by our names, put together from the folder's tensors."""
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    gradients.setdefault(folder.family.hf_name("head.weight"), gradients.get("lm_head.weight"))  # GPT-NeoX: embed_out in files
    found: dict[str, Tensor] = {}
    for stored in folder.family.stored_tensors(model):
        gradient = gradients[stored.name]
        gradient = gradient.t() if stored.transposed else gradient
        for piece in stored.pieces:
            whole = found.setdefault(piece.name, torch.zeros(piece.shape))
            for rows in piece.rows:
                values = gradient[None] if gradient.dim() < whole.dim() else gradient
                whole[rows.logical : rows.logical + rows.count] = values[rows.stored : rows.stored + rows.count]
    return found


def our_model(folder: HFFolder, dtype: torch.dtype = torch.float32, **changes: Any) -> DecoderStage:
    """A folder on one process."""
    model = ModelConfig(**folder.model_fields(), **changes)
    return build_model(model, folder.source(), dtype, torch.device("cpu"))


def gradients_of_stage(stage: DecoderStage) -> dict[str, Tensor]:
    """Gradients of a whole model by logical names."""
    found: dict[str, Tensor] = {}
    for parameter in stage.parameters():
        assert parameter.grad is not None
        for piece in pieces(parameter.shard, tuple(parameter.shape)):  # type: ignore[attr-defined]
            whole = found.setdefault(piece.part.name, parameter.new_zeros(piece.part.shape))
            whole[piece.box.slices] = piece.view(parameter.grad.reshape(-1))
    return found


def gradients_of_layout(
    path: str, parallel: dict[str, Any], compute: str = "float32", training: dict[str, Any] | None = None
) -> tuple[float, list[tuple[str, tuple[int, ...], Box, Tensor]]]:
    """(loss sum, pieces of the summed gradients) of one batch, with the weights of a folder, on this rank."""
    folder = HFFolder(path)
    config = config_of(
        model=ModelConfig(**folder.model_fields()).model_dump(), parallel=parallel, precision={"compute": compute},
        training={"sequence_length": sum(DOCUMENTS), "micro_batch_size": 1, "global_batch_size": 1, **(training or {})},
    )  # fmt: skip
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"), folder.source())

    class OneBatch:
        def batch(self, rows: Any) -> Batch:
            return dataclasses.replace(packed_batch(config.model.vocab_size))

    sums = _run_microbatches(engine, engine.schedule, OneBatch(), range(1))  # type: ignore[arg-type]
    engine.optimizer.reduce_gradients()
    held = []
    for bucket in engine.optimizer.buckets:
        for piece, a, b in bucket.pieces(bucket.lo, bucket.hi):
            held.append((piece.part.name, piece.part.shape, piece.box, piece.view(bucket.own_grad[a:b]).clone()))
    return float(sums[0]), held


def assembled(results: list[Any]) -> dict[str, Tensor]:
    """The gradients of all ranks put together; what several ranks hold must be equal to the bit."""
    found: dict[str, Tensor] = {}
    for _, held in results:
        for name, shape, box, value in held:
            whole = found.setdefault(name, torch.full(shape, torch.nan, dtype=value.dtype))
            there = whole[box.slices]
            assert bool((there.isnan() | (there == value)).all()), name
            whole[box.slices] = value
    assert not any(bool(whole.isnan().any()) for whole in found.values())
    return found
