"""Text from a model in any layout: what each rank of `megatron-llm generate` does. Called by `cli/generate.py`, here or in
processes that it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from tqdm import tqdm

from megatron_llm.config import ModelConfig
from megatron_llm.generation.generate import Sampling, check_prompts, generate
from megatron_llm.generation.model import Place
from megatron_llm.generation.relay import Relay
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_pipeline
from megatron_llm.training.distributed import launched_world_size, pick_device, process_group
from megatron_llm.training.resolve import layout_problems
from megatron_llm.training.spawn import run_ranks
from megatron_llm.training.verify_layouts import MOST_PROCESSES, Layout


@dataclass(frozen=True)
class GenerationRequest:
    """What is to be generated, and where.

    Attributes:
        prompts: ids. batch_size: how many of them at a time.
        dtype: of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU.
        timeout_seconds: limit on all of it in processes that are started, and on every wait of one rank for another.
    """

    place: Place
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    seed: int = 0
    batch_size: int = 32
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    timeout_seconds: float = 86400.0

    @property
    def layout(self) -> Layout:
        tp, pp = self.tensor_parallel, self.pipeline_parallel
        return Layout(f"tp{tp}pp{pp}", tp, pp)


def check_request(request: GenerationRequest, model: ModelConfig) -> None:
    """Raise ValueError with every reason why a request cannot be met."""
    layout, world = request.layout, launched_world_size()
    options = f"--tensor-parallel {layout.tensor_parallel} --pipeline-parallel {layout.pipeline_parallel}"
    config = layout.config(model, 1, "float32", 1.0)
    problems = [f"{options}: {problem}" for problem in layout_problems(config, layout.ranks)]
    if world > 1 and world != layout.ranks:
        problems.append(f"{options}: that is {layout.ranks} ranks, and {world} were started; start as many, or none")
    if world == 1 and layout.ranks > MOST_PROCESSES:
        problems.append(
            f"{options}: {layout.ranks} ranks are more than {MOST_PROCESSES}, the most that are started on one machine; "
            "use torchrun"
        )
    if not 0 < request.timeout_seconds <= 1e7:
        problems.append(f"--timeout {request.timeout_seconds:g} must be more than 0 and at most 1e7 seconds")
    if request.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: torch sees no GPU; use cpu or auto")
    if problems:
        raise ValueError("\n".join(problems))
    check_prompts(model, request.prompts, request.max_new_tokens)


def run_request(request: GenerationRequest) -> list[list[int]] | None:
    """The new ids of every prompt, on rank 0; None on other ranks of a launcher. Ranks are started if none were.

    Raises ValueError as `check_request`.
    """
    check_request(request, request.place.open().config)
    if request.layout.ranks > 1 and launched_world_size() == 1:
        found: list[list[int]] = run_ranks(
            request.layout.ranks,
            _generate_on_rank,
            request,
            timeout_seconds=request.timeout_seconds,
            device=request.device,
        )
        return found
    with process_group(pick_device(request.device), request.timeout_seconds):
        return _generate_on_rank(request)


def _generate_on_rank(request: GenerationRequest) -> list[list[int]] | None:
    """Collective over all ranks of the default process group, if there is one; every rank reads its own part of the weights."""
    device, opened = pick_device(request.device), request.place.open()
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if request.dtype == "auto" else request.dtype
    config = request.layout.config(opened.config, 1, dtype, request.timeout_seconds)
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    stages, runtime = build_pipeline(config, grid, device, opened.weights)
    relay = Relay(grid, {number: stage.eval() for number, stage in stages.items()}, runtime.placement)
    new: list[list[int]] = []
    prompts, each = request.prompts, request.max_new_tokens
    with tqdm(total=len(prompts) * each, desc="generating", unit="token", delay=2, disable=not grid.world.first) as bar:
        for first in range(0, len(prompts), request.batch_size):
            batch = prompts[first : first + request.batch_size]
            new += generate(
                relay,
                batch,
                max_new_tokens=each,
                sampling=request.sampling,
                stop_ids=request.stop_ids,
                seed=request.seed,
                first=first,
                after_pass=partial(bar.update, len(batch)),
            )
            bar.update(len(new) * each - bar.n)  # replies that ended early
    return new if grid.world.first else None
