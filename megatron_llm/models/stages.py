"""The stages of a pipeline that one rank holds, or a whole model. Called by `training/build.py`, and without memory by
`planning/memory.py` and `training/resolve.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from megatron_llm.config import Config, KernelsConfig, ModelConfig, PeftConfig
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.models.lora import adapted_layers
from megatron_llm.models.recompute import Recompute
from megatron_llm.models.split import layer_costs, split_layers
from megatron_llm.ops.kernels import Kernels, triton_problem
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.linear import ColumnParallelLinear, RowParallelLinear, multiply_in_fp8
from megatron_llm.parallel.lora import ColumnLora, RowLora


def build_stages(
    config: Config, grid: Grid, placement: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[int, DecoderStage]:
    """This rank's stages of the pipeline by number, with zero weights.

    placement: the pipeline rank of every stage. An embedding tied to a head on the same rank is one parameter of two stages.
    """
    model, last = config.model, len(placement) - 1
    layers = split_layers(model.num_hidden_layers, placement, *layer_costs(model, config.training.sequence_length))
    stages: dict[int, DecoderStage] = {}
    for stage, rank in enumerate(placement):
        if rank == grid.pp.rank:
            stages[stage] = DecoderStage(
                model,
                grid,
                layers[stage],
                first=stage == 0,
                last=stage == last,
                sequence_parallel=config.parallel.sequence_parallel,
                dtype=dtype,
                device=device,
                kernels=Kernels.choose(config.kernels, device, dtype),
                recompute=Recompute.of(config.training),
            )
    if config.precision.linear == "fp8":
        fused = device.type == "cuda" and triton_problem(device.type, dtype) is None
        multiply_in_fp8(_linears(stages.values()), "triton" if fused else "torch")
    if config.peft is not None:
        add_adapters(stages.values(), model, config.peft)
    if model.tie_word_embeddings and stages.keys() >= {0, last}:
        stages[last].head.weight = stages[0].embedding.weight
    return stages


def add_adapters(stages: Iterable[DecoderStage], model: ModelConfig, peft: PeftConfig) -> None:
    """Give the linear layers that `peft.targets` names adapters of zeros, cut as they are."""
    targets = frozenset(f"{name}.weight" for name in adapted_layers(model, peft))
    for linear in _linears(stages):
        if isinstance(linear, ColumnParallelLinear):
            linear.lora = ColumnLora.of(linear.weight, linear.tp, targets, peft.rank, peft.scale)
        else:
            linear.lora = RowLora.of(linear.weight, linear.tp, targets, peft.rank, peft.scale)


def _linears(stages: Iterable[DecoderStage]) -> Iterator[ColumnParallelLinear | RowParallelLinear]:
    """The linear layers inside decoder layers: not the head."""
    for stage in stages:
        for linear in stage.layers.modules():
            if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
                yield linear


def whole_model(
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    peft: PeftConfig | None = None,
    kernels: KernelsConfig = KernelsConfig(),
) -> DecoderStage:
    """All of a model on one process, with zero weights: for inference, or without memory for the names in it."""
    stage = DecoderStage(
        model,
        Grid.single(),
        range(model.num_hidden_layers),
        first=True,
        last=True,
        sequence_parallel=False,
        dtype=dtype,
        device=device,
        kernels=Kernels.choose(kernels, device, dtype),
    )
    if peft is not None:
        add_adapters([stage], model, peft)
    return stage


def parameters(stages: dict[int, DecoderStage]) -> list[nn.Parameter]:
    """The parameters of a rank's stages, each once, in the order of the model."""
    return list(nn.ModuleList(stages.values()).parameters())
