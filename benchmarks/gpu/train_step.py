"""One training step of Llama shapes, in bfloat16, beside transformers, Liger-Kernel and torchtitan.

    python -m benchmarks.gpu.train_step [--out FILE] [--minutes 9] [--smoke]

The same model, tokens and optimizer (AdamW, clipping): 32,768 tokens a step in micro-batches of 8192, rows of 4096 and of 8192
that attend whole. Ours keeps float32 masters, moments and gradients. So do the peers called "mixed": float32 weights, products in
bfloat16 by autocast. Those called "bfloat16" keep weights, gradients and moments in 2 bytes each, and no masters: they do less.

A step of ours and one of a peer are taken in turns, the order swapped every time, where both fit into memory; else one after the
other. The speed ratio is the median of those of the pairs. FLOPs are those of the model, causally (`planning/flops.py`); MFU is
their rate over the peak of the data sheet. Memory is what a contender alone has at its peak.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.measure import Setting, reason

Step = Callable[[], float]
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0
MICRO_BATCHES = 4
WARM_UP, PAIRS = 2, 7


def _llama(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "Llama 3.2 1B": _llama(2048, 8192, 16, 32, True),
    "Llama 3.1 8B, 8 of 32 layers": _llama(4096, 14336, 8, 32, False),
    "Llama 3.2 3B": _llama(3072, 8192, 28, 24, True),
}
TINY = _llama(64, 128, 2, 8, True) | {"vocab_size": 300}


@dataclass(frozen=True)
class Workload:
    """shape: of the model; length: of a row; rows: of a micro-batch."""

    shape: dict[str, Any]
    length: int
    rows: int

    @property
    def tokens(self) -> int:
        return MICRO_BATCHES * self.rows * self.length

    @property
    def model(self) -> Any:
        from megatron_llm.config import ModelConfig

        return ModelConfig(**self.shape)

    def parameters(self) -> int:
        import math

        from megatron_llm.models.names import logical_tensors

        return sum(math.prod(shape) for _, shape in logical_tensors(self.model))


def workloads(setting: Setting) -> dict[str, Workload]:
    if setting.smoke:
        return {"tiny at 16": Workload(TINY, 16, 2)}
    lengths = {"4k": 4096, "8k": 8192}
    return {f"{name} at {text}": Workload(shape, n, 8192 // n) for name, shape in SHAPES.items() for text, n in lengths.items()}


def ours(work: Workload, setting: Setting) -> Step:
    """This engine on synthetic rows, with the kernels that `auto` takes there."""
    from megatron_llm.config import parse_config
    from megatron_llm.data.stream import build_train_stream
    from megatron_llm.parallel.grid import Grid
    from megatron_llm.training.build import build_engine
    from megatron_llm.training.step import RunState, train_step

    config = parse_config(
        {
            "model": work.shape,
            "data": {"kind": "synthetic"},
            "training": {
                "sequence_length": work.length,
                "micro_batch_size": work.rows,
                "global_batch_size": work.rows * MICRO_BATCHES,
                "steps": 10000,
                "document_isolation": False,
            },
            "optimizer": {**ADAMW, "grad_clip": CLIP},
            "lr_schedule": {"kind": "constant"},
            "precision": {"compute": "bfloat16"},
            "device": setting.device.type,
        }
    )
    engine = build_engine(config, Grid.single(), setting.device)
    stream, state = build_train_stream(config), RunState()
    return lambda: train_step(engine, stream, state).loss


def transformers(work: Workload, setting: Setting, liger: bool, mixed: bool) -> Step:
    """LlamaForCausalLM with sdpa, AdamW(fused=True)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**work.shape, max_position_embeddings=work.length, attn_implementation="sdpa")
    with setting.device:
        model = LlamaForCausalLM(config).to(torch.float32 if mixed else torch.bfloat16)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    model.train()
    return _plain_step(model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, work, setting, mixed)


def torchtitan(work: Workload, setting: Setting) -> Step:
    """Its Llama, compiled, with its loss, in mixed precision as its autocast on one GPU."""
    from torchtitan.models.llama3 import TransformerModelArgs  # up to 0.2
    from torchtitan.models.llama3.model.model import Transformer

    shape = work.shape
    arguments = TransformerModelArgs(
        dim=shape["hidden_size"],
        n_layers=shape["num_hidden_layers"],
        n_heads=shape["num_attention_heads"],
        n_kv_heads=shape["num_key_value_heads"],
        vocab_size=shape["vocab_size"],
        max_seq_len=work.length,
    )
    arguments.hidden_dim = shape["intermediate_size"]
    if shape["tie_word_embeddings"]:
        raise ImportError("its Llama cannot tie its embeddings")
    with setting.device:
        model = Transformer(arguments)
        model.init_weights(setting.device)
    for layer in model.layers.values():
        layer.compile()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    return _plain_step(model, loss, work, setting, mixed=True)


def _plain_step(model: Any, loss: Callable[[torch.Tensor], torch.Tensor], work: Workload, setting: Setting, mixed: bool) -> Step:
    """Micro-batches, clipping and an update as they are written in torch."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)

    def step() -> float:
        total = 0.0
        for _ in range(MICRO_BATCHES):
            ids = torch.randint(0, work.shape["vocab_size"], (work.rows, work.length), device=setting.device)
            with torch.autocast(setting.device.type, torch.bfloat16, enabled=mixed):
                part = loss(ids) / MICRO_BATCHES
            part.backward()
            total = total + part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step


PEERS: dict[str, Callable[[Workload, Setting], Step]] = {
    # Plain ones first: what Liger changes in transformers it does not change back.
    "transformers, mixed": lambda work, setting: transformers(work, setting, liger=False, mixed=True),
    "transformers and Liger, bfloat16": lambda work, setting: transformers(work, setting, liger=True, mixed=False),
    "transformers and Liger, mixed": lambda work, setting: transformers(work, setting, liger=True, mixed=True),
    "torchtitan, mixed": torchtitan,
}


class Contender:
    """A step, built and warm, and the most memory that it has had alone: bytes."""

    def __init__(self, make: Callable[[Workload, Setting], Step], work: Workload, setting: Setting):
        self.setting, self.vocabulary = setting, work.shape["vocab_size"]
        before = self._allocated()
        self.peak = 0
        self.step: Step | None = make(work, setting)
        self.held = 0  # until it has taken a step: what is made in the first one is its own
        for _ in range(1 if setting.smoke else WARM_UP):
            self.timed()
            self.held = self._allocated() - before
        self.peak = 0

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.setting.device.type == "cuda" else 0

    def timed(self) -> float:
        """Seconds of one step."""
        assert self.step is not None
        on_gpu = self.setting.device.type == "cuda"
        others = self._allocated() - self.held
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        loss = self.step()
        if on_gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - begin
        if on_gpu:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)
        if not 0.5 * torch.tensor(self.vocabulary).log() < loss < 20:  # near that of a model at the start
            raise RuntimeError(f"loss {loss} is not that of a model at the start of training")
        return took

    def close(self) -> None:
        self.step = None
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_all(
    setting: Setting, entry: dict[str, Any], left: Callable[[], float], save: Callable[[], None], say: Callable[[str], None]
) -> None:
    """Fills the part's entry in the JSON: a case for each workload."""
    budget, every = left(), workloads(setting)
    for number, (name, work) in enumerate(every.items()):
        share = left() / (len(every) - number)
        end = time.monotonic() + share
        case: dict[str, Any] = {"name": name, "peers": {}}
        try:
            _measure(case, work, setting, end, save, say)
            entry["cases"].append(case)
        except Exception as error:
            entry["absent"][name] = reason(error)
        gone = budget - left()
        say(f"train_step {number + 1}/{len(every)}, {gone:.0f} of {budget:.0f} s: {name}: {_summary(case)}")
        save()


def _measure(case: dict[str, Any], work: Workload, setting: Setting, end: float, save: Callable[[], None], say: Any) -> None:
    """Ours, and every peer that there is time for."""
    from megatron_llm.planning.flops import model_flops_per_token, peak_flops

    on_gpu = setting.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    flops = model_flops_per_token(work.model, work.length)
    pairs = 1 if setting.smoke else PAIRS
    together = not on_gpu or 40 * work.parameters() < 0.8 * torch.cuda.get_device_properties(0).total_memory

    def figures(contender: Contender, times: list[float]) -> dict[str, Any]:
        rate = work.tokens / statistics.median(times)
        mfu = None if peak is None else rate * flops / peak
        return {"tokens_per_second": rate, "mfu": mfu, "peak_bytes": contender.peak, "seconds": times}

    mine = Contender(ours, work, setting)
    alone = [mine.timed() for _ in range(pairs)]
    case |= {"tokens": work.tokens, "parameters": work.parameters(), "ours": figures(mine, alone)}
    if not together:
        mine.close()
    slowest = 3 * sum(alone)
    for peer, make in PEERS.items():
        if time.monotonic() + slowest > end:
            case["peers"][peer] = {"absent": "no time was left"}
            continue
        begin, theirs = time.monotonic(), None
        try:
            theirs = Contender(make, work, setting)
            if together:
                taken = [_pair(mine, theirs, swapped=bool(number % 2)) for number in range(pairs)]
            else:
                taken = [(time_of_ours, theirs.timed()) for time_of_ours in alone]
            ratios = sorted(other / own for own, other in taken)
            ratio = {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
            found = figures(theirs, [other for _, other in taken])
            case["peers"][peer] = found | {"speed_ratio": ratio, "in_turns": together}
        except Exception as error:  # another's package, or no memory for it: ours stays
            case["peers"][peer] = {"absent": reason(error)}
        if theirs is not None:
            theirs.close()
        del theirs
        slowest = max(slowest, time.monotonic() - begin)
        say(f"  {peer}: {case['peers'][peer].get('absent') or case['peers'][peer]['speed_ratio']}")
        save()
    mine.close()


def _pair(mine: Contender, theirs: Contender, swapped: bool) -> tuple[float, float]:
    """(our seconds, theirs)."""
    if swapped:
        other = theirs.timed()
        return mine.timed(), other
    own = mine.timed()
    return own, theirs.timed()


def _summary(case: dict[str, Any]) -> str:
    if "ours" not in case:
        return "absent"
    own = case["ours"]
    mfu = "" if own["mfu"] is None else f", MFU {own['mfu']:.1%}"
    return f"{own['tokens_per_second']:,.0f} tokens/s{mfu}, {own['peak_bytes'] / 2**30:.1f} GiB"


if __name__ == "__main__":
    from benchmarks.gpu.all import main

    sys.exit(main(["--only", "train_step", *sys.argv[1:]]))
