"""Claim: in bfloat16, on two CPU cores or a GPU, one process trains at least as fast as plain `transformers` with fused AdamW.

The same decoder (8 layers, 512 wide, 8/4 heads, ffn 1408, vocabulary 32000), 4 x 512 tokens a step, the same threads, in one
process: a step of each in turn, the order swapped every time, so that a slow moment of the machine hits both. The figure is
the median of the ratios of the pairs. Ours computes in bfloat16 with float32 master weights and gradients.

The claim is about transformers in bfloat16. Most CPUs only emulate that, slowly (minutes a step where there is only AVX2), so
transformers in float32, with twice the bytes, is measured too: it is the harder opponent there.

With `--device cuda` the decoder is larger (16 layers, 2048 wide, 16/8 heads, ffn 5632, vocabulary 32000: 0.89 billion weights), a
step has 4 x 2048 tokens, and the second opponent is transformers in mixed precision: float32 weights, gradients and moments, and
products in bfloat16 by autocast. This engine keeps as much; transformers in bfloat16 keeps no masters, and narrow moments.

    python benchmarks/train_vs_transformers.py [--device cpu] [--pairs 7] [--minutes 5] [--threads 2] [--baselines NAME ...]

Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import finish, machine, parser
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_llm.config import ModelConfig, parse_config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.parallel.grid import Grid
from megatron_llm.planning.flops import model_flops_per_token
from megatron_llm.training.build import build_engine
from megatron_llm.training.step import RunState, train_step


@dataclass(frozen=True)
class Workload:
    """The decoder, and the rows of a step, on a kind of device."""

    shape: dict[str, int]
    rows: int
    sequence: int
    baselines: tuple[str, ...]


WORKLOADS = {
    "cpu": Workload(
        {
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        rows=4,
        sequence=512,
        baselines=("bfloat16", "float32"),
    ),
    "cuda": Workload(
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
        rows=4,
        sequence=2048,
        baselines=("bfloat16", "mixed"),
    ),
}
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0
WARM_UP = 3  # pairs that are not counted, on a GPU: kernels are chosen and loaded, and clocks rise


def transformers_step(work: Workload, baseline: str, device: torch.device) -> Callable[[], float]:
    """A function that trains one step and returns the loss: LlamaForCausalLM, sdpa, AdamW(fused=True)."""
    torch.manual_seed(0)
    mixed = baseline == "mixed"
    config = LlamaConfig(
        **work.shape, max_position_embeddings=work.sequence, tie_word_embeddings=False, attn_implementation="sdpa"
    )
    with device:
        model = LlamaForCausalLM(config).to(torch.float32 if mixed else getattr(torch, baseline))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)

    def step(rows: int = work.rows, length: int = work.sequence) -> float:
        ids = torch.randint(0, work.shape["vocab_size"], (rows, length), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    step(1, 32)  # warm-up: optimizer state and first-use initialization, short because emulated bfloat16 takes minutes
    return step


def megatron_llm_step(work: Workload, device: torch.device) -> Callable[[], float]:
    """The same step with this engine on synthetic data."""
    config = parse_config(
        {
            "model": work.shape,
            "data": {"kind": "synthetic"},
            "training": {
                "sequence_length": work.sequence,
                "micro_batch_size": work.rows,
                "global_batch_size": work.rows,
                "steps": 1000,
                "document_isolation": False,  # whole rows attend, as in the peer: the same FLOPs
            },
            "optimizer": {**ADAMW, "grad_clip": CLIP},
            "lr_schedule": {"kind": "constant"},
            "precision": {"compute": "bfloat16"},
            "device": device.type,
        }
    )
    engine = build_engine(config, Grid.single(), device)
    stream, state = build_train_stream(config), RunState()
    return lambda: train_step(engine, stream, state).loss


def timed(step: Callable[[], float]) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    loss = step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the update may still be under way
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


def summary(pairs: list[tuple[float, float]], work: Workload) -> dict[str, Any]:
    """What the pairs say. FLOPs are those of the model, as in the metrics of a run."""
    ratios = sorted(other / mine for other, mine in pairs)
    tokens = work.rows * work.sequence
    theirs, ours = (tokens / statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    flops = model_flops_per_token(ModelConfig(**work.shape), work.sequence)
    return {
        "speed_ratio": {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
        "tokens_per_second": {"transformers": theirs, "megatron_llm": ours},
        "model_tflops": {"transformers": theirs * flops / 1e12, "megatron_llm": ours * flops / 1e12},
        "seconds_of_pairs": pairs,
    }


def main() -> int:
    """Measure, print a table, write the JSON."""
    options = parser(__doc__)
    options.set_defaults(output=None)
    options.add_argument("--pairs", type=int, default=7, help="timed pairs of steps for each baseline (default: %(default)s)")
    options.add_argument("--minutes", type=float, default=5, help="no new pair after this time (default: %(default)s)")
    options.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    options.add_argument("--device", choices=sorted(WORKLOADS), default="cpu")
    options.add_argument("--baselines", nargs="+", choices=("bfloat16", "float32", "mixed"), help="default: two, by the device")
    args = options.parse_args()
    if args.output is None:
        suffix = "" if args.device == "cpu" else f"_{args.device}"
        args.output = Path(__file__).parent / "results" / f"train_vs_transformers{suffix}.json"
    torch.set_num_threads(args.threads)
    device, work = torch.device(args.device), WORKLOADS[args.device]
    name = torch.backends.cpu.get_cpu_capability() if args.device == "cpu" else torch.cuda.get_device_name()
    conditions = machine("torch", "transformers", threads=args.threads, capability=name)

    ours = megatron_llm_step(work, device)
    timed(ours)
    against: dict[str, dict[str, Any]] = {}
    for name in args.baselines or work.baselines:
        print(f"transformers in {name}, megatron_llm in bfloat16: seconds a step", flush=True)
        theirs = transformers_step(work, name, device)
        if args.device != "cpu":
            measure(theirs, ours, WARM_UP, args.minutes * 60)
        against[name] = summary(measure(theirs, ours, args.pairs, args.minutes * 60), work)
        del theirs
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
        shape={**work.shape, "rows": work.rows, "sequence_length": work.sequence},
        against=against,
    )


if __name__ == "__main__":
    sys.exit(main())
