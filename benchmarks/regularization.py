"""Claim: with dropout in every layer, NEFTune, label smoothing and z-loss together a training step takes at most a tenth longer.

One process with one thread, float32: 4 layers, 512 wide, 8/4 heads, ffn 1408, vocabulary 8192; 2 micro-batches of 2 rows of 256
tokens. Every setting has an engine of its own and takes one step in every round, in an order that turns from round to round. The
figure is the median over rounds of the ratio to the step without any, in seconds of the processor, so that other processes count
little. Beside it dropout alone, forward and backward, against torch's on tensors of that shape: torch keeps a mask, this engine
makes it again.

    python benchmarks/regularization.py [--rounds 11]

Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import finish, machine, parser
from torch import Tensor

from megatron_llm.config import parse_config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.ops.noise import Addresses, dropout
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.step import RunState, train_step

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "hidden_dropout": {"hidden_dropout": 0.1},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-4},
    "all": {"hidden_dropout": 0.1, "neftune_noise_alpha": 5.0, "label_smoothing": 0.1, "z_loss": 1e-4},
}
TOKENS, WIDTH = 512, 512


def stepper(regularization: dict[str, Any]) -> Callable[[], object]:
    """Takes a step of an engine with that setting."""
    config = parse_config(
        {
            "model": {
                "vocab_size": 8192,
                "hidden_size": WIDTH,
                "intermediate_size": 1408,
                "num_hidden_layers": 4,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
            },
            "data": {"kind": "synthetic"},
            "training": {
                "sequence_length": TOKENS // 2,
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "steps": 100,
                "regularization": regularization,
            },
            "optimizer": {"lr": 1e-4},
            "precision": {"compute": "float32"},
            "device": "cpu",
        }
    )
    engine, stream, state = build_engine(config, Grid.single(), torch.device("cpu")), build_train_stream(config), RunState()
    return lambda: train_step(engine, stream, state)


def dropouts() -> dict[str, Callable[[], object]]:
    """Forward and backward of both."""
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    dy, here = torch.randn(TOKENS, WIDTH), Addresses((3, 8), TOKENS // 2, 0, TOKENS)

    def run(make: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: [torch.autograd.grad(make(), x, dy) for _ in range(20)]

    return {"torch": run(lambda: torch.nn.functional.dropout(x, 0.1)), "ours": run(lambda: dropout(x, 0.1, 5, here))}


def rounds_of(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every contender in every round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = [*contenders]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            contenders[name]()
            seconds[name].append(time.process_time() - start)
    return {name: times[1:] for name, times in seconds.items()}


def main() -> int:
    """Measure, print, write the JSON."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=11)
    args = made.parse_args()
    torch.set_num_threads(1)
    conditions = machine("torch", threads=1)
    seconds = rounds_of({name: stepper(chosen) for name, chosen in SETTINGS.items()}, args.rounds)
    figures = {}
    for name, times in seconds.items():
        ratios = sorted(own / without for own, without in zip(times, seconds["none"], strict=True))
        figures[name] = {"milliseconds": 1e3 * statistics.median(times), "ratio": statistics.median(ratios), "ratios": ratios}
        print(f"{name:20} {figures[name]['milliseconds']:8.1f} ms  {figures[name]['ratio']:.3f}", flush=True)
    single = rounds_of(dropouts(), args.rounds)
    ratio = statistics.median(own / other for own, other in zip(single["ours"], single["torch"], strict=True))
    print(f"dropout, forward and backward: {ratio:.2f} times as long as torch's")
    holds = figures["all"]["ratio"] <= 1.1
    claim = "a step with dropout, NEFTune, label smoothing and z-loss takes at most a tenth longer than without"
    return finish(args.output, claim, holds, conditions, steps=figures, dropout_seconds_over_torch=ratio)


if __name__ == "__main__":
    sys.exit(main())
