"""Cross-entropy of 8192 tokens over 128,256 and 131,072 ids, of logits and of hidden states of 4096 channels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from benchmarks.gpu.measure import Case, Cases, Compared, Run, Setting, compiled


def _plain(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="sum")


def _plain_linear(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _plain(x @ weight.t(), labels)


def _liger(logits: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    loss: Tensor = liger_cross_entropy(logits, labels, reduction="sum")
    return loss


def _liger_linear(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(x, weight, labels, reduction="sum")
    return loss


def _both_ways(function: Run, inputs: list[Tensor], *others: Tensor) -> Run:
    """Forward and backward: some of these make the gradient in forward."""

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs, *others), inputs)

    run()
    return run


def _forward(function: Run, *given: Tensor) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = function(*given)
        return out

    return run


def _case(setting: Setting, vocabulary: int, backward: bool) -> Case:
    """Backward: both ways, in place of the logits."""
    from megatron_llm.ops.cross_entropy import local_statistics, logits_gradient_

    tokens, vocabulary = setting.size(8192, 3), setting.size(vocabulary, 300)
    logits = setting.randn(tokens, vocabulary, grad=True)
    labels = torch.randint(vocabulary, (tokens,), device=setting.device)
    ones = torch.ones(tokens, device=setting.device)

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        maximum, total, target = local_statistics(logits, labels, kernel="triton").unbind(1)
        lse = maximum + total.log()
        return (lse - target).sum(), lse

    def ours(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        found, lse = loss(logits, labels)
        if backward:
            logits_gradient_(logits, labels, lse.contiguous(), scale, kernel="triton")
        return found

    def check() -> Iterator[Compared]:
        few = logits.detach()[:64].clone()
        wide = few.double().requires_grad_()
        exact = functional.cross_entropy(wide, labels[:64], reduction="sum")
        found = ours(few, labels[:64], ones[:64])
        yield Compared("loss", found, exact.detach())
        if backward:
            yield Compared("dlogits", few, *torch.autograd.grad(exact, wide))

    def timed(function: Run) -> Run:
        return _both_ways(function, [logits], labels) if backward else _forward(function, logits, labels)

    peers = {
        "torch": lambda: timed(_plain),
        "Liger": lambda: timed(_liger),
        "torch.compile": lambda: timed(compiled(_plain)),
    }
    own = logits.detach().clone()
    moved = (3 if backward else 1) * own.numel() * own.element_size()
    return Case(partial(ours, own, labels, ones), check, peers, bytes=float(moved))


def _linear(setting: Setting, vocabulary: int) -> Case:
    """Both ways: 6 FLOPs for each of T H V. The weight's gradient is added to one in float32, as a step does."""
    from megatron_llm.parallel.grid import Axis
    from megatron_llm.parallel.head import Head, linear_objective
    from megatron_llm.parallel.loss import VocabularySlice

    tokens, hidden, vocabulary = setting.size(8192, 5), setting.size(4096, 16), setting.size(vocabulary, 300)
    x, weight = setting.randn(tokens, hidden, grad=True), setting.randn(vocabulary, hidden, scale=hidden**-0.5, grad=True)
    labels = torch.randint(vocabulary, (tokens,), device=setting.device)
    ones = torch.ones(tokens, device=setting.device)

    def ours(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        head = Head(weight, None, VocabularySlice(0, vocabulary, Axis("tp"), kernel="triton"), gather=False)
        objective, _ = linear_objective(x, head, labels, weights)
        return objective

    def step() -> Run:
        parameter = torch.nn.Parameter(weight.detach())
        parameter.main_grad = torch.zeros(weight.shape, device=setting.device)  # type: ignore[attr-defined]

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(ours(x, parameter, labels, ones), [x])

        return run

    def check() -> Iterator[Compared]:
        few = [x.detach()[:128].clone().requires_grad_(), weight.detach().clone().requires_grad_()]
        wide = [given.detach().double().requires_grad_() for given in few]
        found, exact = ours(*few, labels[:128], ones[:128]), functional.cross_entropy(
            wide[0] @ wide[1].t(), labels[:128], reduction="sum"
        )  # fmt: skip
        narrow = x.dtype is torch.bfloat16  # logits are rounded
        yield Compared("loss", found.detach(), exact.detach(), wide=1e-3 if narrow else 1e-5)
        dx, dw = torch.autograd.grad(found, few)
        expected = torch.autograd.grad(exact, wide)
        yield Compared("dx", dx, expected[0], wide=1e-2 if narrow else 1e-5)
        yield Compared("dw", dw, expected[1], wide=1e-2 if narrow else 1e-5)

    def both_ways(function: Run) -> Run:
        return _both_ways(function, [x, weight], labels)

    peers = {
        "torch": lambda: both_ways(_plain_linear),
        "Liger": lambda: both_ways(_liger_linear),
        "torch.compile": lambda: both_ways(compiled(_plain_linear)),
    }
    return Case(step(), check, peers, flops=6.0 * tokens * hidden * vocabulary)


def cases(setting: Setting) -> Cases:
    sizes = {"131,072": 131072, "128,256": 128256}
    of_logits = {
        f"cross-entropy of {name} logits, {'both ways' if backward else 'forward'}": partial(_case, setting, size, backward)
        for name, size in sizes.items()
        for backward in (False, True)
    }
    return of_logits | {"head and cross-entropy of 128,256, both ways": partial(_linear, setting, 128256)}
