"""The FLOPs that throughput is divided by are those that torch counts in a forward and backward of the whole model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_llm.config import KernelsConfig, ModelConfig, OptimizerConfig, ParameterRuleConfig, PeftConfig
from megatron_llm.models.stages import whole_model
from megatron_llm.ops.batch import Batch
from megatron_llm.ops.scores import causal_mask
from megatron_llm.optim.rules import freeze
from megatron_llm.planning.flops import model_flops_per_token, peak_flops
from megatron_llm.planning.hardware import DEVICES
from tests.decoders import DECODERS
from tests.runs import TINY

LENGTH = 24


PEFT = PeftConfig(rank=3, targets=["attention.[qo]", "layers.[12].mlp.*"])


@pytest.mark.parametrize(("decoder", "peft"), [*((name, None) for name in ("llama", *DECODERS)), ("llama", PEFT), ("neox", PEFT)])
def test_flops_are_those_that_torch_counts(decoder: str, peft: PeftConfig | None) -> None:
    """Attention by explicit matrices, of which the part counts that a mask leaves.

    With adapters the gradient of the embedding is made too, as everywhere but in the first layer of a real run.
    """
    model = ModelConfig(**({"llama": TINY["model"]} | DECODERS)[decoder] | {"max_position_embeddings": LENGTH})
    stage = whole_model(model, torch.float32, torch.device("cpu"), peft, KernelsConfig(attention="reference"))
    if peft is not None:
        freeze(stage.parameters(), OptimizerConfig(lr=1.0, rules=[ParameterRuleConfig(match="embed*", frozen=False)]), True)
    ids = torch.arange(LENGTH)
    batch = Batch(ids, ids, torch.ones(LENGTH), ids, (0, LENGTH))
    with FlopCounterMode(display=False) as flops:
        stage.loss(stage(None, batch), batch).backward()
    counts = {str(op): count for op, count in flops.get_flop_counts()["Global"].items()}
    scores = counts.pop("aten.bmm") / model.num_hidden_layers
    masks = [causal_mask(LENGTH, LENGTH, model.window(layer), ids.device) for layer in range(model.num_hidden_layers)]
    assert counts.keys() <= {"aten.mm", "aten.addmm"}
    products = sum(counts.values())
    expected = products + sum(scores * mask.float().mean().item() for mask in masks)
    assert model_flops_per_token(model, LENGTH, peft) * LENGTH == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 836),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 836),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name: str, teraflops: float | None) -> None:
    """Names as CUDA reports them. Consumer cards: sums in float32, which halves what is advertised."""
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


def test_throughput_and_plans_know_the_same_peaks() -> None:
    names = {"a100-80": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "b200": "NVIDIA B200"}
    for device, name in names.items():
        assert DEVICES[device].flops == peak_flops(name)
