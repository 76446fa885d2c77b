"""Claim: on two CPU cores in bfloat16, a single process trains at least as fast as plain `transformers` with fused AdamW.

The same decoder (8 layers, 512 wide, 8/4 heads, ffn 1408, vocabulary 32000), 4 x 512 tokens a step, the same threads, in one
process: a step of each in turn, the order swapped every time, so that a slow moment of the machine hits both. The figure is
the median of the ratios of the pairs. Ours computes in bfloat16 with float32 master weights and gradients.

The claim is about transformers in bfloat16. Most CPUs only emulate that, slowly (minutes a step where there is only AVX2), so
transformers in float32, with twice the bytes, is measured too: it is the harder opponent there.

    python benchmarks/train_vs_transformers.py [--pairs 7] [--minutes 5] [--threads 2] [--baselines bfloat16 float32]

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
from transformers import LlamaConfig, LlamaForCausalLM

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


def transformers_step(dtype: torch.dtype) -> Callable[[], float]:
    """A function that trains one step and returns the loss: LlamaForCausalLM in `dtype`, sdpa, AdamW(fused=True)."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, max_position_embeddings=SEQUENCE, tie_word_embeddings=False, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to(dtype)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)

    def step(rows: int = ROWS, length: int = SEQUENCE) -> float:
        ids = torch.randint(0, SHAPE["vocab_size"], (rows, length))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    step(1, 32)  # warm-up: optimizer state and first-use initialization, short because emulated bfloat16 takes minutes
    return step


def megatron_llm_step() -> Callable[[], float]:
    """The same step with this engine on synthetic data."""
    config = parse_config(
        {
            "model": SHAPE,
            "data": {"kind": "synthetic"},
            "training": {
                "sequence_length": SEQUENCE,
                "micro_batch_size": ROWS,
                "global_batch_size": ROWS,
                "steps": 1000,
                "document_isolation": False,  # whole rows attend, as in the peer: the same FLOPs
            },
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


def measure(theirs: Callable[[], float], ours: Callable[[], float], pairs: int, seconds: float) -> list[tuple[float, float]]:
    """Seconds of (their step, our step): `pairs` times, or as often as begins within `seconds`, at least once."""
    measured: list[tuple[float, float]] = []
    start = time.perf_counter()
    while not measured or (len(measured) < pairs and time.perf_counter() - start < seconds):
        if len(measured) % 2:
            mine, other = timed(ours), timed(theirs)
        else:
            other, mine = timed(theirs), timed(ours)
        measured.append((other, mine))
        print(f"  {other:10.3f} s {mine:10.3f} s {other / mine:8.2f}x", flush=True)
    return measured


def summary(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """What the pairs say."""
    ratios = sorted(other / mine for other, mine in pairs)
    tokens = ROWS * SEQUENCE
    return {
        "speed_ratio": {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
        "tokens_per_second": {
            "transformers": tokens / statistics.median(other for other, _ in pairs),
            "megatron_llm": tokens / statistics.median(mine for _, mine in pairs),
        },
        "seconds_of_pairs": pairs,
    }


def main() -> int:
    """Measure, print a table, write the JSON."""
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=7, help="timed pairs of steps for each baseline (default: %(default)s)")
    options.add_argument("--minutes", type=float, default=5, help="no new pair after this time (default: %(default)s)")
    options.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    options.add_argument("--baselines", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    conditions = machine("torch", "transformers", threads=args.threads, capability=torch.backends.cpu.get_cpu_capability())

    ours = megatron_llm_step()
    timed(ours)
    against: dict[str, dict[str, Any]] = {}
    for name in args.baselines:
        print(f"transformers in {name}, megatron_llm in bfloat16: seconds a step", flush=True)
        against[name] = summary(measure(transformers_step(getattr(torch, name)), ours, args.pairs, args.minutes * 60))
    print(f"\n{'tokens a second':24} {'transformers':>14} {'megatron_llm':>14} {'ratio':>8}   (lowest to highest of the pairs)")
    for name, figures in against.items():
        speed, ratio = figures["tokens_per_second"], figures["speed_ratio"]
        spread = f"({ratio['lowest']:.2f} to {ratio['highest']:.2f} of {len(figures['seconds_of_pairs'])})"
        theirs, mine = speed["transformers"], speed["megatron_llm"]
        print(f"{'transformers in ' + name:24} {theirs:14,.0f} {mine:14,.0f} {ratio['median']:7.2f}x   {spread}")
    return finish(
        args.output,
        "in bfloat16 megatron_llm trains at least as fast as transformers + fused AdamW: speed ratio >= 1",
        against.get("bfloat16", {}).get("speed_ratio", {}).get("median", 1) >= 1,
        conditions,
        shape={**SHAPE, "rows": ROWS, "sequence_length": SEQUENCE},
        against=against,
    )


if __name__ == "__main__":
    sys.exit(main())
