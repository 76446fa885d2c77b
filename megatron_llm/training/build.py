"""Assembly: from a resolved config to an engine that can step, in one function, in one order.

Called by `training/loop.py`, `benchmarks/` and the tests; what only infers has functions of its own: `cli/generate.py` and
`training/verify.py` call those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from megatron_llm.config import Config, KernelsConfig, ModelConfig
from megatron_llm.models.block import DecoderLayer
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.models.stages import build_stages, parameters, whole_model
from megatron_llm.ops.attention import described
from megatron_llm.ops.kernels import Kernels, prepare_deterministic_products
from megatron_llm.optim.rules import freeze
from megatron_llm.optim.zero1 import ZeroOptimizer
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import TensorSource, fill, pieces
from megatron_llm.parallel.weight_grad import WeightGradients
from megatron_llm.pipeline.check import check
from megatron_llm.pipeline.runtime import PipelineRuntime
from megatron_llm.pipeline.schedules import Schedule, make_schedule, placement
from megatron_llm.training.sources import FreshWeights

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Engine:
    """What a rank needs to train: its stages, their optimizer, and the schedule that drives them.

    stages: by their number in the order of the model.
    schedules: by the rows of a global batch, one for each of its sizes.
    """

    config: Config
    grid: Grid
    device: torch.device
    stages: dict[int, DecoderStage]
    optimizer: ZeroOptimizer
    runtime: PipelineRuntime
    schedules: dict[int, Schedule]

    @property
    def schedule(self) -> Schedule:
        """That of the whole global batch."""
        return self.schedules[self.config.training.global_batch_size]

    @property
    def microbatches(self) -> int:
        """Micro-batches of one model replica in a step on the whole global batch."""
        return self.schedule.microbatches

    @property
    def attention(self) -> list[str]:
        """Which backends of attention run in the layers held here, and why none of the faster ones."""
        layers = [layer for stage in self.stages.values() for layer in stage.layers if isinstance(layer, DecoderLayer)]
        return described({layer.layer: layer.attention.choice for layer in layers})


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    name = config.precision.compute
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return DTYPES[name]


def _needed(stages: Iterable[DecoderStage]) -> dict[int, list[nn.Parameter]]:
    """The parameters that each layer reads, by the index that the layer has in `before_layer` of `DecoderStage.forward`."""
    return {index: parameters for stage in stages for index, parameters in stage.read_before()}


def build_model(
    model: ModelConfig,
    weights: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    kernels: KernelsConfig = KernelsConfig(),
) -> DecoderStage:
    """A whole model on one process, for inference: no optimizer, no buffers."""
    stage = whole_model(model, dtype, device, kernels=kernels)
    _load(stage.parameters(), weights)
    return stage.eval()


def build_pipeline(
    config: Config, grid: Grid, device: torch.device, weights: TensorSource
) -> tuple[dict[int, DecoderStage], PipelineRuntime]:
    """This rank's stages and what sends micro-batches through them, for inference. Collective over the grid."""
    parallel = config.parallel
    owners = placement(parallel.pipeline_schedule, grid.pp.size, parallel.virtual_stages)
    stages = build_stages(config, grid, owners, compute_dtype(config, device), device)
    _load(parameters(stages), weights)
    return stages, _runtime(config, grid, device, owners)


def _load(parameters: Iterable[nn.Parameter], weights: TensorSource) -> None:
    """Fill parameters in place, each rank with its own part of the weights."""
    with torch.no_grad():
        for parameter in parameters:
            for piece in pieces(parameter.shard, tuple(parameter.shape)):  # type: ignore[attr-defined]
                for _ in fill(piece.view(parameter.data.view(-1)), piece.part, piece.box, weights):
                    pass


def _runtime(
    config: Config,
    grid: Grid,
    device: torch.device,
    owners: tuple[int, ...],
    gradients: WeightGradients | None = None,
) -> PipelineRuntime:
    """The runtime of a layout, whose messages are the hidden states of one micro-batch."""
    parallel, training = config.parallel, config.training
    shards = grid.tp.size if parallel.sequence_parallel else 1
    shape = (training.micro_batch_size * training.sequence_length // shards, config.model.hidden_size)
    return PipelineRuntime(grid, shape, compute_dtype(config, device), device, owners, gradients, parallel.timeout_seconds)


def build_engine(
    config: Config,
    grid: Grid,
    device: torch.device,
    weights: TensorSource | None = None,
    progress: Callable[[float], object] = lambda _: None,
) -> Engine:
    """Assemble this rank's engine. Collective over the grid.

    weights: where they come from; None makes fresh ones from the seed. (What else a checkpoint holds, moments and the
    state of the run, is loaded by the loop afterwards.)
    progress: told which part of the weights is there.
    """
    parallel, training = config.parallel, config.training
    if config.kernels.deterministic and device.type == "cuda":
        prepare_deterministic_products()
    schedules = {
        size: make_schedule(
            parallel.pipeline_schedule,
            grid.pp.size,
            size // (training.micro_batch_size * grid.dp.size),
            parallel.virtual_stages,
        )
        for size in training.batch_sizes
    }
    for schedule in schedules.values():
        check(schedule)
    owners = schedules[training.global_batch_size].placement
    dtype = compute_dtype(config, device)
    stages = build_stages(config, grid, owners, dtype, device)
    freeze(parameters(stages), config.optimizer, config.peft is not None)
    kernel = Kernels.choose(config.kernels, device, dtype).optimizer
    optimizer = ZeroOptimizer(
        parameters(stages), grid, config.optimizer, parallel.bucket_size, config.precision, parallel.zero_stage, kernel
    )
    fresh = FreshWeights(training.seed, config.model.initializer_range, device)
    optimizer.load("weights", weights or fresh, progress)
    gradients = WeightGradients(stages.values())
    runtime = _runtime(config, grid, device, owners, gradients)
    if parallel.overlap:
        runtime.before_layer = optimizer.overlap(gradients, _needed(stages.values()))
    return Engine(config, grid, device, stages, optimizer, runtime, schedules)
