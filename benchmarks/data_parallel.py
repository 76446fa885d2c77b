"""Claim: on two processes of one core each, a step with ZeRO-1 takes no longer than with torch's DDP or FSDP2.

The same decoder everywhere (8 layers, 512 wide, 8/4 heads, ffn 1408, vocabulary 8192; 32 million parameters), the same weights,
batches, losses and kernels: the peers wrap this project's model, whole on each rank, so that only the machinery of data
parallelism differs. float32, gloo, one thread a rank, m micro-batches of 256 tokens a rank and step, clipping at norm 1, AdamW.

    zero_1, zero_0          this engine, parallel.zero_stage 1 and 0
    zero_1_bfloat16         computes in bfloat16 with float32 masters: other losses, so beside the comparison
    ddp                     DistributedDataParallel, gradients as views of its buckets; no_sync but in the last micro-batch
    fsdp2_full_shard        fully_shard for least memory: gathers weights for every use, reduces gradients in every micro-batch
    fsdp2_keep_weights      fully_shard for least communication: gathers and reduces everything once a step

Every peer has torch.optim.AdamW(fused=True) and clip_grad_norm_, and sends the sum of loss weights and the loss, as the engine
does. Each contender lives in a pair of processes of its own; in a round each takes one step, in an order that turns from round to
round, and the figure is the median of the rounds' ratios. Losses must agree to 1e-4 in every step. Memory is what a rank holds
beyond what it held with everything imported and no model: the most during the steps, and what is left between them.

    python benchmarks/data_parallel.py [--runs 7] [--microbatches 1 4] [--contenders NAME ...]

Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Ranks, finish, machine, parser
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from megatron_llm.config import Config, ModelConfig, parse_config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine, build_model
from megatron_llm.training.sources import FreshWeights
from megatron_llm.training.step import RunState, train_step

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
RANKS, SEQUENCE = 2, 256
OURS, PEERS = "zero_1", ("ddp", "fsdp2_full_shard", "fsdp2_keep_weights")
CONTENDERS = (OURS, "zero_0", "zero_1_bfloat16", *PEERS)
BYTES = {  # held between steps for every parameter on each of d ranks, and how they come about
    "zero_1": (lambda d: 8 + 8 / d, "weights 4, gradients 4, moments 8 / d; a weight is its own master"),
    "zero_0": (lambda d: 16, "weights 4, gradients 4, moments 8"),
    "zero_1_bfloat16": (lambda d: 6 + 12 / d, "weights 2, gradients 4, masters and moments 12 / d"),
    "ddp": (lambda d: 16, "weights 4, gradients 4 as views of buckets, moments 8"),
    "fsdp2_full_shard": (lambda d: 12 / d, "weights 4 / d, moments 8 / d; in the step gradients 4 / d and layers in use"),
    "fsdp2_keep_weights": (lambda d: 12 / d, "the same; in the step also weights 4 and gradients 4"),
}
Step = Callable[[], float]


def config_of(name: str, microbatches: int) -> Config:
    """What all contenders train."""
    return parse_config(
        {
            "model": SHAPE,
            "data": {"kind": "synthetic"},
            "training": {
                "sequence_length": SEQUENCE,
                "micro_batch_size": 1,
                "global_batch_size": RANKS * microbatches,
                "steps": 1000,
                "document_isolation": False,
            },
            "optimizer": {"lr": 1e-3, "grad_clip": 1.0},
            "lr_schedule": {"kind": "constant"},
            "parallel": {"zero_stage": 0 if name == "zero_0" else 1},
            "precision": {"compute": "bfloat16" if name.endswith("bfloat16") else "float32"},
            "device": "cpu",
        }
    )


def contender(name: str, microbatches: int) -> Callable[[str], dict[str, float]]:
    """On a rank: a function that takes a step or tells what memory is held, in MiB beyond that before there was a model."""
    before, trim = _mebibytes("VmRSS"), ctypes.CDLL(None).malloc_trim
    config = config_of(name, microbatches)
    step, settle = _peer(name, config) if name in PEERS else _engine(config)
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of building, which goes through float64

    def answer(what: str) -> dict[str, float]:
        if what == "memory":
            peak = _mebibytes("VmHWM") - before
            trim(0)  # what is free is not held
            return {"peak_mib": peak, "rest_mib": _mebibytes("VmRSS") - before}
        dist.barrier()
        start = time.perf_counter()
        loss = step()
        settle()
        dist.barrier()
        return {"seconds": time.perf_counter() - start, "loss": loss}

    return answer


def _mebibytes(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, field
    return int(found.group(1)) / 1024


def _engine(config: Config) -> tuple[Step, Callable[[], None]]:
    """A step of this project, and what waits for weights that are still on their way."""
    engine = build_engine(config, Grid.build(config.parallel, config.model.num_key_value_heads), torch.device("cpu"))
    stream, state = build_train_stream(config), RunState()
    return lambda: train_step(engine, stream, state).loss, engine.optimizer.wait_weights


def _nothing() -> None:
    """A peer has its weights when the step ends."""


class _WithLoss(nn.Module):
    """Model and loss in one forward, as wrappers want it: they prepare the weights that a forward uses."""

    def __init__(self, stage: DecoderStage):
        super().__init__()
        self.stage = stage

    def forward(self, batch: Batch) -> Tensor:
        return self.stage.loss(self.stage(None, batch), batch)


def _peer(name: str, config: Config) -> tuple[Step, Callable[[], None]]:
    """The same step with one of torch's wrappers."""
    fresh = FreshWeights(config.training.seed, config.model.initializer_range)
    whole = _WithLoss(build_model(config.model, fresh, torch.float32, torch.device("cpu")).train())
    model: nn.Module
    if name == "ddp":
        model = DistributedDataParallel(whole, gradient_as_bucket_view=True)
    else:
        mesh, again = init_device_mesh("cpu", (RANKS,)), name == "fsdp2_full_shard"
        for layer in whole.stage.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=again)
        model = fully_shard(whole, mesh=mesh, reshard_after_forward=again)
    optimizer, settings = _adamw(model, config), config.training
    stream, first, rank = build_train_stream(config), 0, dist.get_rank()

    def step() -> float:
        nonlocal first
        rows = range(first + rank, first + settings.global_batch_size, RANKS)
        first += settings.global_batch_size
        batches = [stream.batch([row]) for row in rows]
        weight = torch.stack([batch.weights_T.sum() for batch in batches]).sum()
        dist.all_reduce(weight)
        total = torch.zeros(())
        for batch in batches:
            with _only_in(model, batch is batches[-1], keep=name == "fsdp2_keep_weights"):
                loss = model(batch) * (RANKS / weight)  # the wrappers make means over ranks
                loss.backward()
            total += loss.detach() / RANKS
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        return total.item()

    return step, _nothing


def _only_in(model: nn.Module, last: bool, keep: bool) -> Any:
    """Reduce gradients in the last micro-batch only and, if asked to, keep until then what an FSDP model has gathered."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if keep:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
    return nullcontext()


def _adamw(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    settings, parameters = config.optimizer, list(model.parameters())
    assert settings.lr != "auto"
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},  # norms
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def _whole_model(model: ModelConfig) -> DecoderStage:
    """Shapes alone."""
    layers, meta = range(model.num_hidden_layers), torch.device("meta")
    parts = {"first": True, "last": True, "sequence_parallel": False}
    return DecoderStage(model, Grid.single(), layers, **parts, dtype=torch.float32, device=meta)


@dataclass
class Measured:
    """Seconds of every step, MiB at the end, and the last loss, of the slower or larger rank."""

    seconds: list[float]
    memory: dict[str, float]
    loss: float


def measure(names: list[str], microbatches: int, runs: int) -> dict[str, Measured]:
    """`runs` steps of every contender, after one that is not counted."""
    measured = {name: Measured([], {}, 0.0) for name in names}
    with ExitStack() as stack:
        pairs = {name: stack.enter_context(Ranks(RANKS, contender, name, microbatches)) for name in names}
        for number in range(runs + 1):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                step = _of_both(pairs[name]("step"))
                measured[name].seconds.append(step["seconds"])
                measured[name].loss = step["loss"]
            _compare_losses({name: measured[name].loss for name in names})
            times = "  ".join(f"{name} {measured[name].seconds[-1]:.3f} s" for name in names)
            print(f"m = {microbatches}, {f'round {number}' if number else 'warm-up'}: {times}", flush=True)
        for name in names:
            measured[name].memory = _of_both(pairs[name]("memory"))
            del measured[name].seconds[0]
    return measured


def _of_both(answers: list[dict[str, float]]) -> dict[str, float]:
    """A step takes as long as its slower rank; memory must suffice for the larger one."""
    return {key: max(answer[key] for answer in answers) for key in answers[0]}


def _compare_losses(losses: dict[str, float]) -> None:
    """All do the same work."""
    expected = losses[OURS]
    for name, loss in losses.items():
        tolerance = 1e-2 if name.endswith("bfloat16") else 1e-4
        if not abs(loss - expected) < tolerance:
            raise RuntimeError(f"{name} has loss {loss:.6f} where {OURS} has {expected:.6f}: they do not train alike")


def summary(measured: dict[str, Measured], parameters: int) -> dict[str, Any]:
    """Seconds, ratio to ours and MiB of every contender."""
    rows = {}
    for name, of in measured.items():
        ratios = sorted(theirs / mine for theirs, mine in zip(of.seconds, measured[OURS].seconds, strict=True))
        size, why = BYTES[name]
        rows[name] = {
            "seconds": statistics.median(of.seconds),
            "ratio": {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
            **of.memory,
            "predicted_rest_mib": size(RANKS) * parameters / 2**20,
            "predicted_from": why,
            "seconds_of_steps": of.seconds,
        }
    return rows


def print_table(microbatches: int, rows: dict[str, Any]) -> None:
    print(f"\nm = {microbatches:<17} {'step':>9} {'step / zero_1':>28} {'peak':>10} {'rest':>10} {'predicted':>10}")
    for name, row in rows.items():
        ratio = row["ratio"]
        spread = f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f} of {len(row['seconds_of_steps'])})"
        sizes = "".join(f" {row[key]:6.0f} MiB" for key in ("peak_mib", "rest_mib", "predicted_rest_mib"))
        print(f"{name:21} {row['seconds']:7.3f} s {spread:>28}{sizes}")
    print(flush=True)


def main() -> int:
    """Measure, print a table, write the JSON."""
    options = parser(__doc__)
    options.add_argument("--runs", type=int, default=7, help="timed rounds (default: %(default)s)")
    options.add_argument("--microbatches", nargs="+", type=int, default=[1, 4], metavar="M", help="default: 1 4")
    options.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, metavar="NAME", help="default: all")
    args = options.parse_args()
    conditions = machine("torch", ranks=RANKS, threads_of_a_rank=1, capability=torch.backends.cpu.get_cpu_capability())
    parameters = sum(p.numel() for p in _whole_model(config_of(OURS, 1).model).parameters())

    names = [OURS, *(name for name in args.contenders if name != OURS)]
    tables = {}
    for microbatches in args.microbatches:
        rows = summary(measure(names, microbatches, args.runs), parameters)
        tables[f"m{microbatches}"] = rows
        print_table(microbatches, rows)
    peers = [row for rows in tables.values() for name, row in rows.items() if name in PEERS]
    return finish(
        args.output,
        "a step of zero_1 takes no longer than one of DDP or FSDP2: every peer's median ratio is at least 1",
        all(row["ratio"]["median"] >= 1 for row in peers),
        conditions,
        shape={**SHAPE, "parameters": parameters, "tokens_of_a_microbatch": SEQUENCE},
        tables=tables,
    )


if __name__ == "__main__":
    sys.exit(main())
