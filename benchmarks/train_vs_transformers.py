"""Claim: on two CPU cores in bfloat16, a single process trains at least as fast as plain `transformers` with fused AdamW.

The same decoder (8 layers, 512 wide, 8/4 heads, ffn 1408, vocabulary 32000), 4 x 512 tokens a step, the same threads, in one
process: first one step of each in turn, the order swapped every time, so that a slow moment of the machine hits both. The
figure is the median of the ratios of the pairs. Ours keeps float32 master weights and gradients, transformers only bfloat16.

    python benchmarks/train_vs_transformers.py [--pairs 7] [--threads 2] [--output FILE]

Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_llm import __version__
from megatron_llm.config import parse_config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.step import RunState, train_step

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
ROWS, SEQUENCE = 4, 512
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0


def transformers_step() -> Callable[[], float]:
    """A function that trains one step and returns the loss: LlamaForCausalLM in bfloat16, sdpa, AdamW(fused=True)."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, max_position_embeddings=SEQUENCE, tie_word_embeddings=False, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)

    def step() -> float:
        ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, SEQUENCE))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def megatron_llm_step() -> Callable[[], float]:
    """The same step with this engine on synthetic data."""
    config = parse_config(
        {
            "model": SHAPE,
            "data": {"kind": "synthetic"},
            "training": {"sequence_length": SEQUENCE, "micro_batch_size": ROWS, "global_batch_size": ROWS, "steps": 1000},
            "optimizer": {**ADAMW, "grad_clip": CLIP},
            "lr_schedule": {"kind": "constant"},
            "precision": {"compute": "bfloat16"},
            "device": "cpu",
        }
    )
    engine = build_engine(config, Grid.single(), torch.device("cpu"))
    stream, state = build_train_stream(config), RunState()
    return lambda: train_step(engine, stream, state).loss


def timed(step: Callable[[], float]) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - start
    if not 5 < loss < 15:  # ln 32000 = 10.4: both start near it and must really be training
        raise RuntimeError(f"loss {loss} is not that of a model at the start of training")
    return seconds


def machine() -> dict[str, object]:
    """What the figures depend on."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown")
    versions = {
        "megatron_llm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    capability = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu, "cores": os.cpu_count(), "capability": capability, "threads": torch.get_num_threads(), **versions}


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs of steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "train_vs_transformers.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    theirs, ours = transformers_step(), megatron_llm_step()
    for step in (theirs, ours, theirs, ours):  # warm-up: allocations, optimizer state, first-use initialization
        timed(step)
    pairs: list[tuple[float, float]] = []
    print(f"{'pair':>4} {'transformers':>14} {'megatron_llm':>14} {'ratio':>8}")
    for number in range(args.pairs):
        if number % 2:
            mine, other = timed(ours), timed(theirs)
        else:
            other, mine = timed(theirs), timed(ours)
        pairs.append((other, mine))
        print(f"{number:4} {other:12.3f} s {mine:12.3f} s {other / mine:7.2f}x", flush=True)

    ratios = sorted(other / mine for other, mine in pairs)
    result = {
        "claim": "megatron_llm trains at least as fast as transformers + fused AdamW (speed ratio >= 1)",
        "command": " ".join(["python", "benchmarks/train_vs_transformers.py", *sys.argv[1:]]),
        "shape": {**SHAPE, "rows": ROWS, "sequence_length": SEQUENCE, "dtype": "bfloat16"},
        "speed_ratio": {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
        "tokens_per_second": {
            "transformers": ROWS * SEQUENCE / statistics.median(other for other, _ in pairs),
            "megatron_llm": ROWS * SEQUENCE / statistics.median(mine for _, mine in pairs),
        },
        "seconds_of_pairs": pairs,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "machine": machine(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    speed, ratio = result["tokens_per_second"], statistics.median(ratios)
    print(f"\ntokens a second: transformers {speed['transformers']:,.0f}, megatron_llm {speed['megatron_llm']:,.0f}")
    print(f"speed ratio {ratio:.2f} (median of {args.pairs} pairs, {ratios[0]:.2f} to {ratios[-1]:.2f})")
    print("  ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"written to {args.output}")
    return 0 if ratio >= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
