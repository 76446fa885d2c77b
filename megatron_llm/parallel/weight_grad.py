"""Where weight gradients go, and when. Called from the backward passes of the linear layers, the embedding and the norms.

Where: when an optimizer has given a parameter a `main_grad` buffer (`optim/buffers.py`), its gradient is added there, in the
buffer's dtype, and autograd gets None: gradients of many micro-batches accumulate without a rounded copy. Without a
buffer (plain module use) the gradient is returned to autograd as usual.

When: at once, or later. Zero-bubble schedules (Qi et al. 2024, arXiv 2401.10241) split the backward of a stage in B, which
other ranks wait for, and W, the weight gradients, which fill gaps. `WeightGradients` is the queue between the two; it is
made by `training/build.py`, driven by `pipeline/runtime.py`, and known to a parameter by its attribute `weight_gradients`.

Suffixes: T tokens, S tokens of this rank's sequence shard, I input features, O output features, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_llm.ops.embedding import add_to_rows_
from megatron_llm.ops.matmul import accumulate_matmul, matmul
from megatron_llm.parallel.collectives import Handle, start_all_gather
from megatron_llm.parallel.grid import Axis

Finish = Callable[[], object]
Start = Callable[[], Finish]


class WeightGradients:
    """The weight gradients of one rank: those put off from B to W, and how many a step has yet to bring.

    Args:
        modules: whose parameters report here, each as often as modules hold it: an embedding tied to the head on
            one rank gets two gradients a micro-batch.

    Attributes:
        on_last: called with a parameter when its last gradient of the step has been added to `main_grad` (on a GPU: has been
            put into the current stream).
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self.on_last: Callable[[nn.Parameter], None] | None = None
        self._uses = Counter(
            parameter for root in modules for module in root.modules() for parameter in module.parameters(recurse=False)
        )
        self._microbatches = 0
        self._missing: Counter[nn.Parameter] = Counter()
        self._work: dict[Hashable, deque[Start]] = {}
        # An attribute and not a context variable: autograd runs the backward of GPU tensors in a thread of its own.
        self._deferring: deque[Start] | None = None
        for parameter in self._uses:
            parameter.weight_gradients = self  # type: ignore[attr-defined]

    def begin_step(self, microbatches: int) -> None:
        """Expect the gradients of that many micro-batches."""
        self._assert_all_made()
        self._microbatches = microbatches
        self._missing = Counter({parameter: uses * microbatches for parameter, uses in self._uses.items()})

    def end_step(self) -> None:
        """Assert that nothing waits for W, and that every parameter that was given gradients was given all of them.

        A parameter may get none at all: if it is frozen or no loss depends on it, or if autograd accumulates its gradients.
        """
        self._assert_all_made()
        missing = [
            f"{count} of {self._uses[parameter] * self._microbatches} for a parameter of shape {tuple(parameter.shape)}"
            for parameter, count in self._missing.items()
            if count not in (0, self._uses[parameter] * self._microbatches)
        ]
        assert not missing, f"weight gradients are missing at the end of the step: {', '.join(missing)}"

    def _assert_all_made(self) -> None:
        assert not self._work, f"weight gradients of {list(self._work)} were put off and never made"

    @contextmanager
    def deferred(self, key: Hashable) -> Iterator[None]:
        """Backward passes inside leave their weight gradients to `run(key)`, where they accumulate in a `main_grad`."""
        assert self._deferring is None and key not in self._work, key
        self._deferring = self._work[key] = deque()
        try:
            yield
        finally:
            self._deferring = None

    def put(self, start: Start) -> bool:
        """Take a weight gradient for W if the backward under way is a split one; else say no.

        start: begins the communication that the gradient needs and returns what computes and adds it.
        """
        if self._deferring is None:
            return False
        self._deferring.append(start)
        return True

    @torch.no_grad()
    def run(self, key: Hashable) -> None:
        """W: add the gradients that were put off under `key`, in the order of the backward, and let go of their operands.

        The communication of each overlaps the product of the one before, and no more than one is ahead: gathered inputs
        are large.
        """
        work = self._work.pop(key)
        finish: Finish | None = None
        while work or finish is not None:
            following = work.popleft()() if work else None
            if finish is not None:
                finish()
            finish = following

    def count(self, parameter: nn.Parameter) -> None:
        """One more gradient of the parameter is in."""
        self._missing[parameter] -= 1
        if self._missing[parameter] == 0 and self.on_last is not None:
            self.on_last(parameter)


def count_weight_gradient(weight: Tensor) -> None:
    """Tell the queue, if the weight has one, that a gradient was added to its `main_grad`."""
    queue: WeightGradients | None = getattr(weight, "weight_gradients", None)
    if queue is not None:
        assert isinstance(weight, nn.Parameter)
        queue.count(weight)


def linear_weight_gradient(weight_OI: Tensor, dy_TO: Tensor, x_TI: Tensor) -> Tensor | None:
    """dW = dy^T x of a linear layer, now: [T, O], [T, I] -> added to `weight.main_grad` [O, I], or returned."""
    main_grad: Tensor | None = getattr(weight_OI, "main_grad", None)
    if main_grad is None:
        return matmul(dy_TO.t(), x_TI, weight_OI.dtype)
    accumulate_matmul(main_grad, dy_TO.t(), x_TI)
    count_weight_gradient(weight_OI)
    return None


def defer_linear_weight_gradients(wanted: Sequence[tuple[Tensor, Tensor]], x: Tensor, gather: Axis | None = None) -> bool:
    """Leave dW = dy^T x of layers of one input to W if this backward is a split one, and say whether.

    wanted: (weight [O, I], dy [T, O]) of each. x: [T, I], or the shard [S, I] that W gathers over the axis `gather`. Only the
    dys and x stay alive until then.
    """
    # What was saved for backward knows its history, and with it the whole graph; the loss makes dy of such a tensor.
    x, wanted = x.detach(), [(weight_OI, dy_TO.detach()) for weight_OI, dy_TO in wanted]

    def start() -> Finish:
        gathering = Handle(x) if gather is None else start_all_gather(x, gather)

        def finish() -> None:
            x_TI = gathering.wait()
            for weight_OI, dy_TO in wanted:
                linear_weight_gradient(weight_OI, dy_TO, x_TI)

        return finish

    return all(hasattr(weight_OI, "main_grad") for weight_OI, _ in wanted) and _put(wanted[0][0], start)


def embedding_weight_gradient(weight_VH: Tensor, rows_T: Tensor, dy_TH: Tensor, kernel: str = "torch") -> Tensor | None:
    """Add dy of each token to the row that it looked up: into `weight.main_grad` [V, H], now or in W, or returned dense.

    kernel: as of `add_to_rows_`.
    """
    main_grad: Tensor | None = getattr(weight_VH, "main_grad", None)
    if main_grad is None:
        dense_VH = weight_VH.new_zeros(weight_VH.shape)
        add_to_rows_(dense_VH, rows_T, dy_TH, kernel)
        return dense_VH

    def add() -> None:
        add_to_rows_(main_grad, rows_T, dy_TH, kernel)
        count_weight_gradient(weight_VH)

    if not _put(weight_VH, lambda: add):
        add()
    return None


def vector_weight_gradient(weight: Tensor, dweight: Tensor) -> Tensor | None:
    """Add the gradient of a norm's weight or a bias, unrounded: into `weight.main_grad`, now or in W, or returned rounded.

    The sum over tokens falls off the pass over x and dy that the input gradient needs anyway. Were it left to W, two [T, H]
    tensors would be kept and read once more; so what waits for W is only the result.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return dweight.to(weight.dtype)

    def add() -> None:
        main_grad.add_(dweight)
        count_weight_gradient(weight)

    if not _put(weight, lambda: add):
        add()
    return None


def _put(weight: Tensor, start: Start) -> bool:
    """Only a weight with a `main_grad` can wait: what autograd is to accumulate it must get in the backward itself."""
    queue: WeightGradients | None = getattr(weight, "weight_gradients", None)
    return queue is not None and hasattr(weight, "main_grad") and queue.put(start)
