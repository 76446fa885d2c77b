"""The decoder against transformers' LlamaForCausalLM: logits, loss and every gradient, from an imported random folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_llm.config import ModelConfig
from megatron_llm.hf.reader import HFFolder
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import pieces
from megatron_llm.training.build import build_model
from megatron_llm.training.step import _run_microbatches
from tests.ranks import run_ranks
from tests.runs import config_of

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # heads * head_dim != hidden_size
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "large theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}
DOCUMENTS = (5, 1, 17, 9)


def random_folder(folder: Path, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **settings})).float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(folder)
    return model.eval()


def packed_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    total = sum(DOCUMENTS)
    tokens = torch.randint(0, SHAPE["vocab_size"], (total + 1,), generator=generator)
    boundaries = torch.tensor((0, *DOCUMENTS)).cumsum(0).tolist()
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])
    weights = torch.rand(total, generator=generator).round()
    return Batch(tokens[:-1], tokens[1:], weights, positions, tuple(boundaries))


def reference(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [T, V], weighted loss sum) with every document alone, which is what packing must equal."""
    logits = torch.cat([model(tokens[None]).logits[0] for tokens in batch.tokens_T.split(DOCUMENTS)])
    losses = torch.nn.functional.cross_entropy(logits, batch.labels_T, reduction="none")
    return logits, (losses * batch.weights_T).sum()


def hf_names(folder: HFFolder) -> dict[str, str]:
    """Logical name -> the folder's name."""
    return {tensor.logical: tensor.hf for tensor in folder.family.tensor_names(ModelConfig(**folder.model_fields()))}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_transformers(tmp_path: Path, variant: str) -> None:
    hf = random_folder(tmp_path, **VARIANTS[variant])
    folder = HFFolder(tmp_path)
    stage = build_model(ModelConfig(**folder.model_fields()), folder.source(), torch.float32, torch.device("cpu"))
    batch = packed_batch()

    expected_logits, expected_loss = reference(hf, batch)
    expected_loss.backward()
    logits = stage.logits(stage(None, batch))
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    loss = stage.loss(stage(None, batch), batch)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, atol=0, rtol=1e-5)

    names = hf_names(folder)
    expected = {name: parameter.grad for name, parameter in hf.named_parameters()}
    seen = set()
    for parameter in stage.parameters():
        for piece in pieces(parameter.shard, tuple(parameter.shape)):
            name = names[piece.part.name]
            gradient = piece.view(parameter.grad.reshape(-1))
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, (name, error)
            seen.add(name)
    assert seen == expected.keys()


def gradients_of_layout(path: str, parallel: dict[str, Any]) -> tuple[float, list[Any]]:
    """(loss sum, pieces of the summed gradients) of one batch, with the weights of a folder, on this rank."""
    from megatron_llm.training.build import build_engine

    folder = HFFolder(path)
    fields = folder.model_fields()
    config = config_of(
        model=fields, parallel=parallel, precision={"compute": "float32"},
        training={"sequence_length": sum(DOCUMENTS), "micro_batch_size": 1, "global_batch_size": 1},
    )  # fmt: skip
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"), folder.source(config.model))

    class OneBatch:
        def batch(self, rows: Any) -> Batch:
            return packed_batch()

    sums = _run_microbatches(engine, engine.schedule, OneBatch(), range(1))  # type: ignore[arg-type]
    engine.optimizer.reduce_gradients()
    held = []
    for bucket in engine.optimizer.buckets:
        for piece, a, b in bucket.pieces(bucket.lo, bucket.hi):
            held.append((piece.part.name, piece.box.slices, piece.view(bucket.own_grad[a:b]).clone()))
    return float(sums[0]), held


@pytest.mark.parametrize(
    "world, parallel",
    [(2, {"tensor_parallel": 2}), (4, {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": False})],
)
@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_layouts_equal_transformers(tmp_path: Path, variant: str, world: int, parallel: dict[str, Any]) -> None:
    hf = random_folder(tmp_path, **VARIANTS[variant])
    _, expected_loss = reference(hf, packed_batch())
    expected_loss.backward()
    names = hf_names(HFFolder(tmp_path))
    results = run_ranks(world, gradients_of_layout, str(tmp_path), parallel)
    assert sum(loss for loss, _ in results) == pytest.approx(expected_loss.item(), rel=1e-5)
    gradients = dict(hf.named_parameters())
    for _, held in results:
        assert held
        for name, index, value in held:
            expected = gradients[names[name]].grad
            assert (value - expected[index]).norm() < 1e-5 * expected.norm(), name


def test_a_stage_without_boundaries_attends_across_documents(tmp_path: Path) -> None:
    """The other tests would notice if documents were not isolated: without boundaries the logits differ."""
    random_folder(tmp_path)
    folder = HFFolder(tmp_path)
    stage = build_model(ModelConfig(**folder.model_fields()), folder.source(), torch.float32, torch.device("cpu"))
    batch = packed_batch()
    merged = Batch(batch.tokens_T, batch.labels_T, batch.weights_T, batch.positions_T, (0, sum(DOCUMENTS)))
    assert (stage(None, batch) - stage(None, merged)).abs().max() > 1e-3
