"""AdamW over a flat slice with float32 masters and bfloat16 weights, the norm of its gradient, and an embedding's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Case, Cases, Compared, Run, Setting

HYPER: dict[str, Any] = {"scale": 0.5, "update": 3, "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Written out, of float64."""
    (b1, b2), lr, t = HYPER["betas"], HYPER["lr"], HYPER["update"]
    g = g * HYPER["scale"]
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    step = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + HYPER["eps"])
    return w * (1 - lr * HYPER["weight_decay"]) - lr * step, m, v


def _update(setting: Setting, gradients: torch.dtype) -> Case:
    from megatron_llm.ops.adamw import adamw_

    n = setting.size(1 << 28, 1 << 12)

    def operands(n: int) -> list[Tensor]:
        return [
            setting.randn(n, dtype=torch.float32),
            setting.randn(n, dtype=gradients),
            setting.randn(n, dtype=torch.float32, scale=0.1),
            setting.randn(n, dtype=torch.float32, scale=0.1).square_(),
        ]

    w, g, m, v = operands(n)
    out = torch.empty(n, device=setting.device, dtype=torch.bfloat16)
    ours = partial(adamw_, out=out, rounding=None, kernel="triton", **HYPER)

    def check() -> Iterator[Compared]:
        few = operands(min(n, 1 << 20))
        expected = _adamw(*(x.double() for x in few))
        ours(*few, out=out[: len(few[0])])
        for what, actual, exact in zip(("w", "m", "v"), (few[0], *few[2:]), expected, strict=True):
            yield Compared(what, actual, exact)
        if setting.device.type == "cuda":  # the interpreter does not round to bfloat16 as a GPU does
            yield Compared("bfloat16", out[: len(few[0])], expected[0])

    def fused() -> Run:
        step, scale = (torch.full((), x, device=setting.device) for x in (3.0, 1.0 / HYPER["scale"]))
        rates = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False, "maximize": False}
        wide = g.float()

        def run() -> None:
            torch._fused_adamw_([w], [wide], [m], [v], [], [step], grad_scale=scale, **rates)
            out.copy_(w)

        return run

    moved = n * (4 + 4 + 4 + g.element_size() + 12 + 2)
    return Case(partial(ours, w, g, m, v), check, {"torch": fused}, bytes=float(moved))


def _norm(setting: Setting) -> Case:
    from megatron_llm.ops.grad_norm import sum_of_squares

    x = setting.randn(setting.size(1 << 29, 1 << 12), dtype=torch.float32)

    def check() -> Iterator[Compared]:
        exact = sum(part.double().square().sum() for part in x.split(1 << 26))
        assert isinstance(exact, Tensor)
        yield Compared("sum", sum_of_squares(x, "triton"), exact)

    peers = {"torch": lambda: partial(sum_of_squares, x, "torch"), "foreach_norm": lambda: partial(torch._foreach_norm, [x])}
    return Case(partial(sum_of_squares, x, "triton"), check, peers, bytes=4.0 * x.numel())


def _embedding(setting: Setting) -> Case:
    """The least: the gradients read, and each row that is met once read and written in float32."""
    from megatron_llm.ops.embedding import add_to_rows_

    tokens, vocabulary, hidden = setting.size(8192, 9), setting.size(128256, 7), setting.size(4096, 32)
    # Drawn by rank as words are: the square of a uniform number meets some rows often and most never.
    ids = (torch.rand(tokens, device=setting.device).square() * vocabulary).long()
    dy = setting.randn(tokens, hidden)
    table = torch.zeros(vocabulary, hidden, device=setting.device)

    def check() -> Iterator[Compared]:
        fresh, columns = torch.zeros_like(table), slice(0, 64)
        add_to_rows_(fresh, ids, dy, "triton")
        exact = torch.zeros(fresh[:, columns].shape, dtype=torch.float64, device=setting.device)
        yield Compared("rows", fresh[:, columns], exact.index_add_(0, ids, dy[:, columns].double()))

    peers = {"torch": lambda: partial(add_to_rows_, table, ids, dy, "torch")}
    moved = dy.numel() * dy.element_size() + int(ids.unique().numel()) * hidden * 8
    return Case(partial(add_to_rows_, table, ids, dy, "triton"), check, peers, bytes=float(moved))


def cases(setting: Setting) -> Cases:
    return {
        "AdamW, float32 gradients": partial(_update, setting, torch.float32),
        "AdamW, bfloat16 gradients": partial(_update, setting, torch.bfloat16),
        "gradient norm": partial(_norm, setting),
        "embedding gradient": partial(_embedding, setting),
    }
